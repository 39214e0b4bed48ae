"""A checkpoint for fast tests: 28x28 pixels, ten timesteps, a tiny network with random weights."""

from pathlib import Path

from model import checkpoint
from model.checkpoint import CheckpointConfig, Probe
from model.sampler import Guidance
from model.schedule import ScheduleConfig
from tests.tiny import tiny_unet

NUM_STEPS = 10


def save_tiny_checkpoint(
    path: Path, *, label_drop: float = 0.1, guidance: Guidance | None = None, num_steps: int = NUM_STEPS
) -> Path:
    network = tiny_unet(image_size=28, num_steps=num_steps, widths=(8, 8))
    config = CheckpointConfig(
        unet=network.config,
        schedule=ScheduleConfig(num_steps=num_steps),
        guidance=guidance or Guidance(1.5, start=2, stop=8),
        training={"label_drop": label_drop},
        probe=Probe(num_steps=2),
    )
    checkpoint.save(path, network, config)
    return path
