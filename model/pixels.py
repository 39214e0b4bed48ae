"""Conversion between images in [-1, 1] and pixels of 8 bits."""

import torch
from torch import Tensor


def to_pixels(x: Tensor) -> Tensor:
    """Returns an image in [-1, 1] as uint8, of the same shape. Clips values outside of the range."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_pixels(pixels: Tensor) -> Tensor:
    """Returns pixels of 0 to 255 as float32 in [-1, 1], of the same shape."""
    return pixels.float() / 127.5 - 1
