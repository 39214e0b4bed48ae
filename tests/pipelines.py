"""Small pipelines of diffusers with random weights, for tests."""

import contextlib
import warnings
from pathlib import Path
from typing import Any

import torch

with warnings.catch_warnings():  # the dependencies of diffusers raise warnings
    warnings.simplefilter("ignore")
    import diffusers
    from diffusers import UNet2DModel

# As that of google/ddpm-cifar10-32, with fewer channels and smaller images.
NETWORK: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}


def write_pipeline(
    folder: Path, scheduler: Any = None, num_classes: int | None = None, kind: str = "DDPMPipeline", **network: Any
) -> Any:
    """Writes a pipeline with random weights to a folder, and returns it."""
    torch.manual_seed(1)
    unet = UNet2DModel(**NETWORK | network, num_class_embeds=num_classes)
    pipeline = getattr(diffusers, kind)(unet, scheduler or diffusers.DDPMScheduler())
    with contextlib.redirect_stderr(None):
        pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
