"""Encodes images as PNG files with provenance, as contact sheets and as ZIP archives."""

import base64
import io
import re
import zipfile
from collections.abc import Mapping

import numpy as np

from app.engine.job import Pixels
from model.png import Provenance, encode_pixels

ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # earliest date of the format; constant, so that equal images give equal archives


def encode_image(pixels: Pixels, scale: int = 1, text: Mapping[str, str] | None = None) -> bytes:
    """Encodes one image as PNG. Each pixel is enlarged to scale x scale pixels."""
    return encode_pixels(pixels, scale=scale, text=text)


def encode_base64(png: bytes) -> str:
    return base64.b64encode(png).decode()


def encode_images(images: list[Pixels], provenance: Provenance, scale: int) -> list[bytes]:
    """Encodes each image as one PNG file."""
    first = provenance.first_index
    return [encode_image(pixels, scale, provenance.text(i)) for i, pixels in enumerate(images, first)]


def encode_sheet(images: list[Pixels], provenance: Provenance, scale: int) -> bytes:
    """Encodes one image, or a contact sheet of several images."""
    sheet = images[0] if len(images) == 1 else arrange(images, provenance.shape(len(images)))
    return encode_image(sheet, scale, sheet_text(provenance, len(images)))


def sheet_text(provenance: Provenance, count: int) -> dict[str, str]:
    """Returns the text chunks of one image, or of a contact sheet of `count` images."""
    return provenance.text(provenance.first_index if count == 1 else f"0-{count - 1}")


def arrange(images: list[Pixels], shape: tuple[int, int]) -> Pixels:
    """Returns the contact sheet of images, with these numbers of rows and columns. Empty cells are black."""
    rows, columns = shape
    height, width = images[0].shape[:2]
    sheet = np.zeros((rows * height, columns * width, *images[0].shape[2:]), dtype=np.uint8)
    for i, pixels in enumerate(images):
        top, left = i // columns * height, i % columns * width
        sheet[top : top + height, left : left + width] = pixels
    return sheet


def file_name_of(provenance: Provenance) -> str:
    """Returns the start of the name of the file of an image: its class, such as `digit-7` or `truck`.

    Characters other than letters, digits, dots and underscores become hyphens.
    """
    name = re.sub(r"[^\w.]+", "-", "-".join(provenance.labels)).strip("-.")
    return f"digit-{name}" if provenance.has_digits else name or "class"


def encode_zip(images: list[Pixels], provenance: Provenance, scale: int) -> bytes:
    """Returns a ZIP archive with one PNG per image. The PNG files are not compressed again."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for i, png in enumerate(encode_images(images, provenance, scale)):
            start = provenance.task.get("Task") or file_name_of(provenance.of_image(provenance.first_index + i))
            name = f"{start}-seed-{provenance.seed}-{i}.png"
            archive.writestr(zipfile.ZipInfo(name, ZIP_DATE), png)
    return buffer.getvalue()
