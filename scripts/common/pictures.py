"""Converts image tensors to 8-bit images and writes image grids as PNG files."""

from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from model.files import write_atomically
from model.pixels import to_pixels
from model.png import encode_pixels

GRID_COLUMNS = 10  # of the pictures of an epoch


def grid(x_0: Tensor, columns: int) -> Tensor:
    """Arranges images (N, C, H, W) in [-1, 1] row by row. Returns uint8 (rows * H, columns * W, C).

    N must be a multiple of `columns`.
    """
    return rearrange(to_pixels(x_0), "(r k) c h w -> (r h) (k w) c", k=columns)


def arrange(x_0: Tensor, shape: tuple[int, int]) -> Tensor:
    """Arranges images (N, C, H, W) in [-1, 1] as a sheet. Returns uint8 (rows * H, columns * W, C).

    `shape` is the numbers of rows and columns. Empty cells are black.
    """
    rows, columns = shape
    empty = torch.full((rows * columns - len(x_0), *x_0.shape[1:]), -1.0)
    return grid(torch.cat([x_0, empty]), columns)


def save_grid(x_0: Tensor, path: Path, *, columns: int, scale: int = 2) -> None:
    """Writes images (N, C, H, W) as one PNG. `scale` is the integer factor by which they are enlarged."""
    write_atomically(path, encode_pixels(grid(x_0.cpu(), columns).numpy(), scale=scale))


def to_image(pixels: Tensor) -> Image.Image:
    """Returns an image from uint8 (H, W, C): greyscale if C is 1, else RGB."""
    array = pixels.numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
