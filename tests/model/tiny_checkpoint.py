"""Writes a small checkpoint that supports guidance."""

from pathlib import Path
from typing import Any

from model import checkpoint
from model.checkpoint import CheckpointConfig
from model.schedule import ScheduleConfig
from model.spec import Guidance
from tests.tiny import tiny_unet


def tiny_checkpoint(folder: Path, steps: tuple[int, ...] = (), **config: Any) -> Path:
    network = tiny_unet(**config)
    for parameter in network.parameters():
        parameter.mul_(0.6)  # larger weights would clip all pixels
    guidance = Guidance(scale=2.0, start=20, stop=80)
    training = {"label_drop": 0.1}
    config = CheckpointConfig(network.config, ScheduleConfig(), guidance=guidance, steps=steps, training=training)
    checkpoint.save(folder / "tiny.safetensors", network, config)
    return folder / "tiny.safetensors"
