"""Encodes pixels as PNG files with their provenance, as contact sheets and as ZIP archives."""

import base64
import io
import math
import zipfile
from collections.abc import Mapping

import numpy as np
from PIL import Image

from app.engine.job import Options, Pixels
from model.png import Provenance, encode_png

ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # the format's first day; fixed, so that the same images give the same archive


def provenance_of(options: Options, sha256: str) -> Provenance:
    """Returns the provenance of a job's images. `sha256` is the digest of the checkpoint."""
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
    """Returns a PNG as base64 text, for JSON."""
    return base64.b64encode(png).decode()


def encode_images(images: list[Pixels], provenance: Provenance, scale: int) -> list[bytes]:
    """Returns one PNG for each image."""
    return [encode_image(pixels, scale, provenance.text(i)) for i, pixels in enumerate(images)]


def encode_sheet(images: list[Pixels], provenance: Provenance, scale: int) -> bytes:
    """Returns a PNG of the single image, or a contact sheet of all: row-major, without gaps, empty cells black."""
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
    """Returns a ZIP archive with one PNG for each image. It does not compress them, since PNG is compressed already."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for i, png in enumerate(encode_images(images, provenance, scale)):
            archive.writestr(zipfile.ZipInfo(f"digit-{provenance.digit}-seed-{provenance.seed}-{i}.png", ZIP_DATE), png)
    return buffer.getvalue()
