"""Fixtures with checkpoints of random weights, for grey and colour images."""

from pathlib import Path

import pytest
import torch

from model import checkpoint
from model.checkpoint import Checkpoint, CheckpointConfig
from model.prediction import PredictionConfig
from model.schedule import ScheduleConfig
from tests.app.runner.rows import GUIDANCE
from tests.tiny import tiny_unet


@pytest.fixture(scope="module", params=[1, 3], ids=["grey", "colour"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the file of a checkpoint with random weights."""
    network = tiny_unet(image_channels=request.param)
    for parameter in network.parameters():
        parameter.mul_(0.6)  # With smaller weights, not all pixels are clipped.
    config = CheckpointConfig(
        unet=network.config, schedule=ScheduleConfig(), guidance=GUIDANCE, training={"label_drop": 0.1}
    )
    file = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    checkpoint.save(file, network, config)
    return file


@pytest.fixture
def loaded(path: Path) -> Checkpoint:
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
