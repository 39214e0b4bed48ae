"""Makes small picture files, and files that are expensive to decode."""

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
DRAWING = np.zeros((24, 16), np.uint8)  # an F: every turn and reflection of it is different
DRAWING[4:20, 4:6] = DRAWING[4:6, 4:12] = DRAWING[10:12, 4:10] = 255


def encode(image: Image.Image, name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def grey(pixels: np.ndarray = DRAWING) -> Image.Image:
    return Image.fromarray(pixels)


def chunk(name: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, pixels: bytes, extra: Sequence[bytes] = (), depth: int = 8, colour: int = 0) -> bytes:
    """Returns a PNG file with this compressed pixel data."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"".join([SIGNATURE, header, *extra, chunk(b"IDAT", pixels), chunk(b"IEND")])


def zeros(num_bytes: int) -> bytes:
    """Returns compressed zeros, without allocating the uncompressed data."""
    compressor = zlib.compressobj(9)
    parts = [compressor.compress(bytes(2**20)) for _ in range(num_bytes // 2**20)]
    return b"".join([*parts, compressor.compress(bytes(num_bytes % 2**20)), compressor.flush()])


def animation(name: str, num_frames: int) -> bytes:
    frames = [Image.new("L", (4, 4), 97 * i % 256) for i in range(num_frames)]
    return encode(frames[0], name, save_all=True, append_images=frames[1:], duration=20)


def exif(orientation: int) -> bytes:
    metadata = Image.Exif()
    metadata[0x0112] = orientation
    return metadata.tobytes()
