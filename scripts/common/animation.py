"""Animated pictures of the reverse process."""

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from model.files import write_atomically
from scripts.common.drawing import DrawingRequest, open_drawer, options_from
from scripts.common.pictures import grid, to_image
from scripts.common.progress import Reporter

SCALE = 3  # the picture has 840 x 84 pixels for ten digits
STEPS_PER_FRAME = 2
FIRST_MS, FRAME_MS, LAST_MS = 700, 60, 3000


def plot_animation(request: DrawingRequest, out: Path, reporter: Reporter) -> None:
    """Writes the reverse process of all digits as an animated WebP. It shows x_t after every second step."""
    drawer = open_drawer(request)
    options = options_from(request, drawer.checkpoint)
    drawer.compile(request.compile, reporter)
    y = torch.arange(len(drawer.class_names))
    frames: list[Tensor] = []

    def keep(t: int, x_t: Tensor, x_0: Tensor) -> None:
        frames.append(x_t.cpu())

    x_0 = drawer.draw(
        y, torch.zeros_like(y), options, reporter, seed=request.seed, batch_size=len(y), on_step=keep
    )  # (10, C, H, W)
    write_atomically(out, encode_animation([*frames[::STEPS_PER_FRAME], x_0]))


def encode_animation(frames: Sequence[Tensor]) -> bytes:
    """Returns a lossless animated WebP of frames (N, C, H, W) in [-1, 1]. The images of a frame form one line.

    The animation repeats forever and shows its last frame for three seconds.
    """
    images = [_enlarged(to_image(grid(frame, len(frame)))) for frame in frames]
    durations = [FIRST_MS, *[FRAME_MS] * (len(images) - 2), LAST_MS]
    file = io.BytesIO()
    images[0].save(
        file, format="WEBP", save_all=True, append_images=images[1:], duration=durations, loop=0, lossless=True
    )
    return file.getvalue()


def _enlarged(image: Image.Image) -> Image.Image:
    size = (image.width * SCALE, image.height * SCALE)
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST)
