"""Pixels -> PNG files with their provenance, contact sheets and archives."""

import base64
import io
import math
import zipfile
from dataclasses import dataclass

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from app import VERSION
from app.engine.job import Options, Pixels

PNG_LEVEL = 6
ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # the format's first day: the same images are the same archive


@dataclass(frozen=True, slots=True)
class Provenance:
    """What is written into every PNG: all that is needed to draw it again."""

    options: Options
    sha256: str

    def chunks(self, index: str) -> PngInfo:
        """The text chunks for the image of that index, or range of indices."""
        info = PngInfo()
        for key, value in {
            "Software": f"unfog {VERSION}",
            "Digit": str(self.options.digit),
            "Seed": str(self.options.seed),
            "Index": index,
            "Sampler": self.options.sampler,
            "Steps": str(self.options.num_steps),
            "Guidance-Scale": str(self.options.guidance_scale),
            "Model-SHA256": self.sha256,
        }.items():
            info.add_text(key, value)
        return info


def encode_png(pixels: Pixels, scale: int = 1, chunks: PngInfo | None = None) -> bytes:
    """A PNG, each pixel enlarged to scale x scale."""
    buffer = io.BytesIO()
    enlarged = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
    Image.fromarray(enlarged).save(buffer, format="PNG", pnginfo=chunks, compress_level=PNG_LEVEL)
    return buffer.getvalue()


def encode_base64(png: bytes) -> str:
    """For JSON."""
    return base64.b64encode(png).decode()


def encode_images(images: list[Pixels], provenance: Provenance, scale: int) -> list[bytes]:
    """One PNG an image."""
    return [encode_png(pixels, scale, provenance.chunks(str(i))) for i, pixels in enumerate(images)]


def encode_sheet(images: list[Pixels], provenance: Provenance, scale: int) -> bytes:
    """The one image, or all of them on a contact sheet: row-major, no gaps, empty cells black."""
    if len(images) == 1:
        return encode_images(images, provenance, scale)[0]
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    height, width = images[0].shape[:2]
    sheet = np.zeros((rows * height, columns * width, *images[0].shape[2:]), dtype=np.uint8)
    for i, pixels in enumerate(images):
        top, left = i // columns * height, i % columns * width
        sheet[top : top + height, left : left + width] = pixels
    return encode_png(sheet, scale, provenance.chunks(f"0-{len(images) - 1}"))


def encode_zip(images: list[Pixels], provenance: Provenance, scale: int) -> bytes:
    """An archive of one PNG an image, stored as they are: PNG is compressed already."""
    buffer = io.BytesIO()
    options = provenance.options
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for i, png in enumerate(encode_images(images, provenance, scale)):
            archive.writestr(zipfile.ZipInfo(f"digit-{options.digit}-seed-{options.seed}-{i}.png", ZIP_DATE), png)
    return buffer.getvalue()
