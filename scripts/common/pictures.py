"""Images as files: grids of digits in 8 bits."""

import io
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from model.checkpoint import write_atomically


def to_pixels(x_0: Tensor) -> Tensor:
    """(..., H, W) in [-1, 1] -> uint8."""
    return ((x_0.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def grid(x_0: Tensor, columns: int) -> Tensor:
    """(N, C, H, W) in [-1, 1] -> uint8 (rows * H, columns * W, C), row-major; N a multiple of columns."""
    return rearrange(to_pixels(x_0), "(r k) c h w -> (r h) (k w) c", k=columns)


def save_grid(x_0: Tensor, path: Path, *, columns: int, scale: int = 2) -> None:
    """Writes the images (N, C, H, W) as one PNG, each enlarged by whole pixels."""
    pixels = grid(x_0.cpu(), columns).numpy()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    enlarged = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    enlarged.save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())
