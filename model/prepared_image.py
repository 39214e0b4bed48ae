"""Converts pictures to images of a model without assumptions about what they show: their central square, resized.

digit_image.py does this for drawings of digits.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model.pixels import from_pixels
from model.png import MAX_SCALE

BAND_BYTES = 4 * 2**20  # rows are converted to float32 in bands of about this size, to limit the memory
FINE = 8  # a picture is first reduced to this number of pixels per pixel of the image


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """An image that was made from a picture, and how it was made."""

    pixels: Tensor  # uint8, (C, size, size)
    fit: Literal["resize", "digit"]  # the whole picture or its central square, or the drawing of a digit alone
    inverted: bool  # True if the brightness was inverted

    @property
    def x(self) -> Tensor:
        """The image as float32 in [-1, 1], (C, size, size)."""
        return from_pixels(self.pixels)


@torch.inference_mode()
def central_square(picture: Any, size: int, *, inverted: bool = False) -> PreparedImage:
    """Converts a picture (H, W) or (H, W, 3), uint8, to an image of size x size pixels.

    The image is the central square of the picture, resized with antialiasing. An image that was enlarged by an integer
    factor becomes the original image again. `inverted` is True if light and dark are to be exchanged.
    """
    channels = _channels_of(picture)  # (C, H, W)
    factor = enlargement_of(picture, size)
    channels = _square(channels[:, ::factor, ::factor])  # (C, s, s)
    side = channels.shape[1]
    if side != size:
        fine = torch.stack([block_means(channel, FINE * size) for channel in channels])[None]  # (1, C, s, s) in [0, 1]
        image = F.interpolate(fine, (size, size), mode="bilinear", antialias=True)[0]  # (C, size, size)
        channels = (image * 255).round().clamp(0, 255).to(torch.uint8)
    return PreparedImage(255 - channels if inverted else channels.contiguous(), "resize", inverted)


@torch.inference_mode()
def central_mask(mask: Any, size: int) -> Tensor:
    """Converts a mask (H, W), bool, as `central_square` converts a picture. Returns bool (1, size, size).

    A pixel of the result is True if any True pixel of the mask contributes to it.
    """
    square = _square(torch.as_tensor(mask)[None])[0]  # (s, s)
    if len(square) == size:
        return square[None]
    fine = block_means(square.to(torch.uint8) * 255, FINE * size)[None, None]  # (1, 1, s, s)
    return F.interpolate(fine, (size, size), mode="bilinear", antialias=True)[0] > 0


def enlargement_of(picture: Any, size: int) -> int:
    """Returns the factor by which an image of size x size pixels was enlarged to the picture (H, W) or (H, W, 3).

    Returns 1 unless each pixel of such an image became factor x factor equal pixels.
    """
    pixels = torch.as_tensor(picture)
    factor = pixels.shape[0] // size
    if not 2 <= factor <= MAX_SCALE or tuple(pixels.shape[:2]) != (factor * size, factor * size):
        return 1
    image = pixels[::factor, ::factor]
    enlarged = image.repeat_interleave(factor, dim=0).repeat_interleave(factor, dim=1)
    return factor if torch.equal(enlarged, pixels) else 1


def block_means(grey: Tensor, longest: int) -> Tensor:
    """Averages blocks of k x k pixels, so that no side is longer than `longest`. Returns float32 in [0, 1].

    Works in bands of rows, so that no float32 copy of a large picture is made.
    """
    k = -(-max(grey.shape) // longest)
    if k == 1:
        return grey.float() / 255
    rows = k * max(1, BAND_BYTES // (4 * k * grey.shape[1]))
    bands = [F.avg_pool2d(band.float()[None, None], k, ceil_mode=True)[0, 0] for band in grey.split(rows)]
    return torch.cat(bands) / 255


def _channels_of(picture: Any) -> Tensor:
    """Returns a picture (H, W) or (H, W, 3) as (C, H, W). Raises ValueError for another shape or an empty picture."""
    pixels = torch.as_tensor(picture)
    if pixels.ndim not in (2, 3) or not pixels.numel():
        raise ValueError(f"A picture must have the shape (H, W) or (H, W, 3), not {tuple(pixels.shape)}")
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def _square(channels: Tensor) -> Tensor:
    """Returns the central square of (C, H, W)."""
    height, width = channels.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return channels[:, top : top + side, left : left + side]
