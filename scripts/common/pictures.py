"""Images as files: grids of digits in 8 bits."""

from pathlib import Path

from einops import rearrange
from PIL import Image
from torch import Tensor

from model.files import write_atomically
from model.pixels import to_pixels
from model.png import encode_png


def grid(x_0: Tensor, columns: int) -> Tensor:
    """(N, C, H, W) in [-1, 1] -> uint8 (rows * H, columns * W, C), row-major; N a multiple of columns."""
    return rearrange(to_pixels(x_0), "(r k) c h w -> (r h) (k w) c", k=columns)


def save_grid(x_0: Tensor, path: Path, *, columns: int, scale: int = 2) -> None:
    """Writes the images (N, C, H, W) as one PNG, each enlarged by whole pixels."""
    write_atomically(path, encode_png(to_image(grid(x_0.cpu(), columns)), scale=scale))


def to_image(pixels: Tensor) -> Image.Image:
    """Returns an image from uint8 (H, W, C); grey if C is 1."""
    array = pixels.numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
