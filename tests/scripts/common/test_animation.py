"""The animated picture of the reverse process, read again by Pillow."""

import io

import torch
from PIL import Image, ImageSequence

from model.pixels import to_pixels
from scripts.common.animation import FIRST_MS, FRAME_MS, LAST_MS, SCALE, encode_animation


def test_animation_shows_every_frame_without_loss() -> None:
    frames = [torch.rand(10, 1, 28, 28, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in range(4)]
    with Image.open(io.BytesIO(encode_animation(frames))) as animation:
        shown = [frame.convert("L") for frame in ImageSequence.Iterator(animation)]
        assert animation.size == (10 * 28 * SCALE, 28 * SCALE)
    assert len(shown) == len(frames)
    for frame, image in zip(frames, shown, strict=True):
        expected = torch.cat(list(to_pixels(frame)[:, 0]), dim=1)  # (28, 280)
        pixels = torch.tensor(list(image.tobytes()), dtype=torch.uint8).view(28 * SCALE, 280 * SCALE)
        assert torch.equal(pixels[::SCALE, ::SCALE], expected)


def test_animation_repeats_and_shows_its_last_frame_longest() -> None:
    frames = [torch.full((2, 1, 4, 4), value) for value in (-1.0, 0.0, 1.0)]
    with Image.open(io.BytesIO(encode_animation(frames))) as animation:
        durations = []
        for frame in ImageSequence.Iterator(animation):
            frame.load()
            durations.append(frame.info["duration"])
        assert durations == [FIRST_MS, FRAME_MS, LAST_MS]
        assert animation.info["loop"] == 0
