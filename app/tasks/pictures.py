"""Decodes pictures of clients to grey or RGB pixels.

Decoding a permitted picture needs at most about 100 MB of memory, or 150 MB in colour.
"""

import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import numpy as np
from PIL import Image

from app.engine.job import Pixels
from app.tasks.picture_files import PictureError, PictureFile, damaged, inspect

BLACK, WHITE = 0, 255
BAND_ROWS = 64  # rows that are converted at a time; a converted copy of a large picture would double the memory
# A picture with a larger share of opaque pixels has an opaque background. In other pictures, the opaque pixels are the
# strokes.
OPAQUE_BACKGROUND = 0.5


def decode_mask(data: bytes) -> Pixels:
    """Decodes a mask. Its transparent pixels are black. Raises PictureError."""
    return decode(data, BLACK)


def decode_transparency(data: bytes) -> Pixels:
    """Decodes a mask that marks pixels by transparency: pixels with alpha 0 become white, all others black.

    Raises PictureError, also if the file has no alpha channel and no transparent colour.
    """
    return _decode_with(_transparency, data)


def decode(data: bytes, background: int | None = None) -> Pixels:
    """Decodes a PNG, JPEG, WebP or single-frame GIF file to grey pixels (H, W), ITU-R BT.601. Raises PictureError.

    Pictures with transparency are placed on `background`. If it is None, black or white is used, so that their strokes
    are visible. EXIF orientation is applied. 16-bit pixels are scaled to 8 bits.
    """
    return _decode_with(partial(_grey, background=background), data)


def decode_colour(data: bytes) -> Pixels:
    """Decodes a picture as `decode` does, but to RGB pixels (H, W, 3). Raises PictureError.

    Pictures with transparency are placed on white.
    """
    return _decode_with(_rgb, data, "RGB")


def _decode_with(convert: Callable[[Image.Image], Pixels], data: bytes, mode: Literal["L", "RGB"] = "L") -> Pixels:
    file = inspect(data)
    try:
        pixels = _decode(file, convert, mode)
    except PictureError:
        raise
    except Exception as error:  # Pillow raises many types of exceptions for damaged files.
        raise damaged(file.format) from error
    return _upright(pixels, file.orientation)


def _decode(file: PictureFile, convert: Callable[[Image.Image], Pixels], mode: Literal["L", "RGB"]) -> Pixels:
    with Image.open(io.BytesIO(file.data), formats=[file.format]) as image:
        if image.size != (file.width, file.height):
            raise damaged(file.format)
        if file.format == "JPEG":
            image.draft(mode, None)  # for L, decodes only the brightness and leaves out the colours
        image.load()
        _scale_transparent_colour(image, file)
        return convert(image)


def _grey(image: Image.Image, background: int | None) -> Pixels:
    grey: Pixels = np.empty((image.height, image.width), np.uint8)
    if not image.has_transparency_data:
        for rows, band, _ in _bands(image):
            grey[rows] = band
        return grey
    background = _background(image) if background is None else background
    for rows, band, alpha in _bands(image):
        product = band.astype(np.uint16) * alpha + background * (255 - alpha).astype(np.uint16)  # at most 255 * 255
        grey[rows] = (product + 127) // 255
    return grey


def _rgb(image: Image.Image) -> Pixels:
    if image.mode.startswith("I"):  # 16 bits of grey
        return np.repeat(_grey(image, WHITE)[..., None], 3, axis=2)
    rgb: Pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, BAND_ROWS):
        rows = slice(top, min(top + BAND_ROWS, image.height))
        band = image.crop((0, rows.start, image.width, rows.stop))
        if not image.has_transparency_data:
            rgb[rows] = np.asarray(band.convert("RGB"))
            continue
        rgba = np.asarray(band.convert("RGBA")).astype(np.uint16)
        product = rgba[..., :3] * rgba[..., 3:] + WHITE * (255 - rgba[..., 3:])  # at most 255 * 255
        rgb[rows] = (product + 127) // 255
    return rgb


def _transparency(image: Image.Image) -> Pixels:
    if not image.has_transparency_data:
        raise PictureError(
            "The mask has no transparency. Save it as a PNG file with an alpha channel, and make the pixels to fill in "
            "transparent"
        )
    marked: Pixels = np.empty((image.height, image.width), np.uint8)
    for rows, _, alpha in _bands(image):
        marked[rows] = np.where(alpha == 0, WHITE, BLACK)
    return marked


def _scale_transparent_colour(image: Image.Image, file: PictureFile) -> None:
    """Scales the transparent colour of a PNG file as Pillow scales the pixels. Pillow does not scale this colour."""
    colour = image.info.get("transparency")
    if file.format != "PNG" or colour is None:
        return
    depth, kind = file.data[24], file.data[25]  # in the chunk IHDR
    if kind == 0 and depth in (2, 4):
        image.info["transparency"] = colour * 255 // (2**depth - 1)
    if kind == 2 and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _bands(image: Image.Image) -> Iterator[tuple[slice, Pixels, Pixels]]:
    """Yields the rows, their grey values and their alpha values, in bands."""
    for top in range(0, image.height, BAND_ROWS):
        bottom = min(top + BAND_ROWS, image.height)
        yield slice(top, bottom), *_grey_and_alpha(image, image.crop((0, top, image.width, bottom)))


def _grey_and_alpha(image: Image.Image, band: Image.Image) -> tuple[Pixels, Pixels]:
    if image.mode.startswith("I"):  # 16 bits; a colour that is transparent has alpha 0
        deep = np.asarray(band).astype(np.uint32)
        alpha = np.where(deep == image.info.get("transparency", -1), 0, 255)
        return ((deep + 128) // 257).astype(np.uint8), alpha.astype(np.uint8)
    if not image.has_transparency_data:
        grey = np.asarray(band.convert("L"))
        return grey, np.full_like(grey, 255)
    both = np.asarray(band.convert("RGBA").convert("LA"))
    return both[..., 0], both[..., 1]


def _background(image: Image.Image) -> int:
    """Returns black or white: the colour on which the opaque pixels are visible."""
    total = opaque = 0
    for _, band, alpha in _bands(image):
        total += int((band * alpha.astype(np.uint32)).sum(dtype=np.uint64))
        opaque += int(alpha.sum(dtype=np.uint64))
    is_light = total >= 128 * opaque
    has_background = opaque >= OPAQUE_BACKGROUND * 255 * image.width * image.height
    return 255 if is_light == has_background else 0


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Turns and mirrors the pixels according to the EXIF orientation."""
    if orientation in (2, 3, 7, 8):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 6, 7):
        pixels = pixels[::-1]
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    return np.ascontiguousarray(pixels)
