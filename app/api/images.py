"""Pixels -> PNG files with their provenance, contact sheets and archives."""

import base64
import io
import math
import zipfile
from collections.abc import Mapping

import numpy as np
from PIL import Image

from app.engine.job import Options, Pixels
from model.png import Provenance, encode_png

ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # the format's first day: the same images are the same archive


def provenance_of(options: Options, sha256: str) -> Provenance:
    """Returns the provenance of a job's images, drawn with the weights of this digest."""
    return Provenance(
        digit=options.digit,
        seed=options.seed,
        sampler=options.sampler,
        num_steps=options.num_steps,
        guidance_scale=options.guidance_scale,
        model_sha256=sha256,
    )


def encode_image(pixels: Pixels, scale: int = 1, text: Mapping[str, str] | None = None) -> bytes:
    """Returns one image as PNG, each pixel enlarged to scale x scale."""
    return encode_png(Image.fromarray(pixels), scale=scale, text=text)


def encode_base64(png: bytes) -> str:
    """For JSON."""
    return base64.b64encode(png).decode()


def encode_images(images: list[Pixels], provenance: Provenance, scale: int) -> list[bytes]:
    """One PNG an image."""
    return [encode_image(pixels, scale, provenance.text(i)) for i, pixels in enumerate(images)]


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
    return encode_image(sheet, scale, provenance.text(f"0-{len(images) - 1}"))


def encode_zip(images: list[Pixels], provenance: Provenance, scale: int) -> bytes:
    """An archive of one PNG an image, stored as they are: PNG is compressed already."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for i, png in enumerate(encode_images(images, provenance, scale)):
            archive.writestr(zipfile.ZipInfo(f"digit-{provenance.digit}-seed-{provenance.seed}-{i}.png", ZIP_DATE), png)
    return buffer.getvalue()
