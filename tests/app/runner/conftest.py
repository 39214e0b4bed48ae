"""Fixtures with checkpoints of random weights, for grey and colour images."""

from pathlib import Path

import pytest
import torch

from app.runner import warm_up
from model import checkpoint
from model.checkpoint import Checkpoint, CheckpointConfig
from model.prediction import PredictionConfig
from model.schedule import ScheduleConfig
from tests.app.runner.rows import GUIDANCE
from tests.tiny import tiny_unet


@pytest.fixture(scope="module", params=["grey"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the file of a checkpoint with random weights. Its images are grey, except with rows.GREY_AND_COLOUR."""
    network = tiny_unet(image_channels=3 if request.param == "colour" else 1)
    for parameter in network.parameters():
        parameter.mul_(0.6)  # With smaller weights, not all pixels are clipped.
    config = CheckpointConfig(
        unet=network.config, schedule=ScheduleConfig(), guidance=GUIDANCE, training={"label_drop": 0.1}
    )
    file = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    checkpoint.save(file, network, config)
    return file


@pytest.fixture
def loaded(path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    """Returns the checkpoint. A warm-up measures its steps for at most 0.05 s."""
    monkeypatch.setattr(warm_up, "TIMING_SECONDS", 0.05)
    monkeypatch.setattr(warm_up, "LONGEST_TIMING_SECONDS", 0.05)
    return checkpoint.load(path)


@pytest.fixture
def other(loaded: Checkpoint, tmp_path: Path) -> Checkpoint:
    """Returns a checkpoint with another network and schedule, which predicts v and permits only four steps."""
    torch.manual_seed(5)
    network = tiny_unet(image_channels=loaded.config.unet.image_channels, widths=(8, 24), seed=5)
    config = CheckpointConfig(
        unet=network.config,
        schedule=ScheduleConfig(kind="cosine"),
        prediction=PredictionConfig("v"),
        samplers=("ddim",),
        steps=(4,),
    )
    checkpoint.save(tmp_path / "other.safetensors", network, config)
    return checkpoint.load(tmp_path / "other.safetensors")
