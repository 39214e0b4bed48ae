"""Animations (GIF and WebP) that show how the images of a request emerge from noise.

A frame shows x_t of each image, arranged in a contact sheet. The last frame shows the finished images.
"""

import asyncio
import io
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from fastapi import Request
from PIL import Image
from PIL.ExifTags import Base

from app.api.http.media_types import GIF
from app.api.http.requests import cancel_on_disconnect
from app.api.http.thread_priority import lower_priority
from app.engine.job import Frame, FrameRequest, Pixels
from app.errors import InvalidRequest, Overloaded
from app.tasks.images import arrange

FRAME_MS, LAST_MS = 60, 2000  # GIF stores a multiple of 10 ms
# The largest number of pixels of all frames together. Such an animation takes up to 1.3 s of a core (WebP of 64 images
# with scale 2).
MAX_PIXELS = 16_000_000
MAX_PENDING_PIXELS = 4 * MAX_PIXELS  # of all animations that are admitted and not yet encoded
FIRST_SECONDS = 1e-7  # per pixel, before the first animation
# The largest number of pixels of one frame. WebP needs up to 50 bytes of memory for each pixel. Pillow holds the GIL
# while it copies a frame (up to 20 ms) or a finished file (up to 40 ms for 20 MB, in colour).
MAX_FRAME_PIXELS = 4_000_000
GREYS = bytes(level for level in range(256) for _ in range(3))  # a palette of all grey levels
# GIF: a palette for each grey frame would make the files larger.
GREY_GIF: dict[str, Any] = {"palette": GREYS, "interlace": 0}
COLOUR_GIF: dict[str, Any] = {"interlace": 0}
# WebP: a higher method or quality takes up to four times as long and makes files at most a fifth smaller.
LOSSLESS_WEBP: dict[str, Any] = {"lossless": True, "method": 1, "quality": 25}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Animation:
    """The frames that a request for an animation needs from the engine, and the pixels of all frames together."""

    frames: FrameRequest
    num_pixels: int


class AnimationEncoder:
    """Encodes animations one after the other in a thread of low priority, and limits how many are pending.

    An animation is pending from its admission until it is encoded, so also while it waits for the engine. The counts
    have no lock: only the event loop may call the methods.
    """

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1, "animations", lower_priority)
        self._pending = 0  # pixels
        # Seconds per pixel: a moving average, in which a large animation counts more than a small one.
        self._seconds = FIRST_SECONDS

    @contextmanager
    def admit(self, num_pixels: int) -> Iterator[None]:
        """Counts an animation as pending for the duration of the block.

        Raises Overloaded if others are pending and all of them together would exceed MAX_PENDING_PIXELS.
        """
        if self._pending and self._pending + num_pixels > MAX_PENDING_PIXELS:
            # There is room when as many pixels as this animation has are encoded.
            wait = math.ceil(self._seconds * min(num_pixels, self._pending))
            raise Overloaded(max(1, wait), "Too many animations are being made. Retry later or request a smaller one")
        self._pending += num_pixels
        try:
            yield
        finally:
            self._pending -= num_pixels

    async def run(self, request: Request, encode: Callable[[], T], num_pixels: int) -> T:
        """Returns the result of `encode`, which encodes an admitted animation, or raises its exception.

        Raises ClientGoneError after a disconnect. A call that has not begun is then dropped.
        """

        def measured() -> tuple[T, float]:
            start = time.monotonic()
            return encode(), time.monotonic() - start

        future = asyncio.get_running_loop().run_in_executor(self._worker, measured)
        result, seconds = await cancel_on_disconnect(request, future)
        self._seconds += (seconds - self._seconds * num_pixels) / MAX_PIXELS
        return result

    def close(self) -> None:
        """Cancels the animations that are not being encoded yet."""
        self._worker.shutdown(wait=False, cancel_futures=True)


class FrameCollector:
    """Collects the frames of a job.

    It needs no lock: other threads read the frames only after the future of the job is done, and from then on the
    engine thread adds no more.
    """

    def __init__(self, num_frames: int, count: int, shape: tuple[int, int]) -> None:
        self._num_frames, self._count, self._shape = num_frames, count, shape
        self._x_t: npt.NDArray[np.uint8] | None = None  # (frames without the last one, images, H, W) or (..., H, W, 3)

    def add(self, frame: Frame) -> None:
        """Adds a copy of a frame, because its pixels are part of an array that also has those of other requests."""
        if self._x_t is None:
            self._x_t = np.zeros((self._num_frames - 1, self._count, *frame.pixels.shape), dtype=np.uint8)
        self._x_t[frame.number, frame.index] = frame.pixels

    def sheets(self, images: list[Pixels]) -> list[Pixels]:
        """Returns the contact sheet of each frame. The last one shows `images`, the finished images."""
        earlier = [] if self._x_t is None else [list(frame) for frame in self._x_t]
        return [arrange(frame, self._shape) for frame in (*earlier, images)]


def num_frames_of(num_previews: int, num_steps: int) -> int:
    """Returns the number of frames: at least one, for the finished images, and at most one for each step."""
    return max(1, min(num_previews, num_steps))


def num_pixels_of(image_shape: tuple[int, int, int], shape: tuple[int, int], scale: int, num_frames: int) -> int:
    """Returns the number of pixels of all frames of an animation of images (C, H, W). `shape` is that of `arrange`.

    Raises InvalidRequest if it is too large.
    """
    rows, columns = shape
    _, height, width = image_shape
    num_pixels = rows * height * columns * width * scale**2
    if num_pixels > MAX_FRAME_PIXELS:
        message = f"The frames would have {num_pixels:,} pixels each, more than {MAX_FRAME_PIXELS:,}"
        field, what = ("scale", "scale or count") if scale > 1 else ("count", "count")
        raise InvalidRequest.of(field, f"{message}. Reduce {what}")
    if num_frames * num_pixels > MAX_PIXELS:
        message = (
            f"The {num_frames} frames would have {num_frames * num_pixels:,} pixels together, more than "
            f"{MAX_PIXELS:,}. Reduce previews to {MAX_PIXELS // num_pixels}, or reduce scale or count"
        )
        raise InvalidRequest([{"loc": ["query", "previews"], "msg": message}])
    return num_frames * num_pixels


def encode_animation(media_type: str, sheets: Sequence[Pixels], text: Mapping[str, str], scale: int) -> bytes:
    """Encodes frames as an animation that repeats forever. Each pixel is enlarged to scale x scale pixels.

    The file contains `text`, which must be ASCII, as a JSON object: in the comment of a GIF file, and in the EXIF field
    ImageDescription of a WebP file. A GIF file has at most 256 colours in each frame.
    """
    description, is_gif = json.dumps(text), media_type == GIF
    first, *others = [_enlarged(sheet, scale, has_palette=is_gif) for sheet in sheets]
    options: dict[str, Any]
    if is_gif:
        options = {**(GREY_GIF if first.mode == "L" else COLOUR_GIF), "comment": description.encode("ascii")}
    else:
        options = {**LOSSLESS_WEBP, "exif": _exif(description, text["Software"])}
    durations, buffer = [*[FRAME_MS] * len(others), LAST_MS], io.BytesIO()
    first.save(
        buffer,
        format="GIF" if is_gif else "WEBP",
        save_all=True,
        append_images=others,
        duration=durations,
        loop=0,
        **options,
    )
    return buffer.getvalue()


def _enlarged(sheet: Pixels, scale: int, *, has_palette: bool) -> Image.Image:
    image = Image.fromarray(sheet)
    if has_palette and image.mode == "RGB":  # Pillow would otherwise choose the colours after the enlargement.
        image = image.quantize(method=Image.Quantize.FASTOCTREE)
    if scale > 1:
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    return image


def _exif(description: str, software: str) -> bytes:
    exif = Image.Exif()
    exif[Base.ImageDescription], exif[Base.Software] = description, software
    return exif.tobytes().removeprefix(b"Exif\0\0")  # a prefix for JPEG files only
