"""Conversion between images in [-1, 1] and 8-bit pixels."""

import torch
from torch import Tensor


def to_pixels(x: Tensor, *, is_clipped: bool = False) -> Tensor:
    """Returns an image in [-1, 1] as uint8 pixels 0..255 of the same shape.

    Clips values outside [-1, 1]. With `is_clipped`, there must be no such values.
    """
    clipped = x if is_clipped else x.clamp(-1, 1)
    return ((clipped + 1) * 127.5).round().to(torch.uint8)


def from_pixels(pixels: Tensor) -> Tensor:
    """Returns uint8 pixels 0..255 as a float32 image in [-1, 1] of the same shape."""
    return pixels.float() / 127.5 - 1
