"""Tests of the text chunks that are read from PNG files. test_pictures.py tests the rest of the module."""

import json
import struct
import zlib

import numpy as np
import pytest

from app.tasks.picture_files import MAX_CHUNKS, MAX_LABEL_BYTES, MAX_TEXT_BYTES, PictureError, inspect, read_text
from model.png import encode_pixels
from tests.app.picture_samples import chunk, png, zeros

NAMES = {"Seed", "Digit"}
PIXELS = zlib.compress(bytes(2))  # of a picture of one grey pixel


def text(name: str, value: str) -> bytes:
    return chunk(b"tEXt", f"{name}\0{value}".encode("latin-1"))


def read(*extra: bytes) -> dict[str, str]:
    data = png(1, 1, PIXELS, extra)
    inspect(data)
    return read_text(data, NAMES)


def test_text_chunks_with_known_names_are_read() -> None:
    assert read(text("Seed", "42"), text("Digit", "7"), text("Author", "me")) == {"Seed": "42", "Digit": "7"}
    assert read() == {}
    assert read(text("Seed", "")) == {"Seed": ""}
    assert read(text("Seed", "\xb2")) == {"Seed": "\xb2"}


def test_text_chunk_after_the_pixels_is_read() -> None:
    data = png(1, 1, PIXELS)
    assert read_text(data[:-12] + text("Seed", "42") + data[-12:], NAMES) == {"Seed": "42"}
    assert read_text(data + text("Seed", "42"), NAMES) == {}  # The file ends with IEND.


def test_keyword_must_be_complete() -> None:
    others = [chunk(b"tEXt", b"Seed"[:3] + b"\0" + b"42"), chunk(b"tEXt", b"Seed42"), chunk(b"tEXt"), text("seed", "1")]
    assert read(*others) == {}


def test_keyword_without_a_value_is_an_empty_text() -> None:
    assert read(chunk(b"tEXt", b"Seed")) == {"Seed": ""}


def test_repeated_chunk_is_refused() -> None:
    with pytest.raises(PictureError, match="Seed occurs more than once"):
        read(text("Seed", "42"), text("Seed", "42"))
    assert read(text("Author", "me"), text("Author", "you")) == {}


def test_chunk_is_limited_in_length_if_its_name_is_known() -> None:
    longest = "1" * (MAX_TEXT_BYTES - len("Seed\0"))
    assert read(text("Seed", longest)) == {"Seed": longest}
    with pytest.raises(PictureError, match=f"Seed has more than {MAX_TEXT_BYTES} bytes"):
        read(text("Seed", longest + "1"))
    with pytest.raises(PictureError, match="Seed has more than"):
        read(text("Seed", "1" * 2**21))
    assert read(text("Author", "a" * 2**21), text("a" * 2**21, "")) == {}


def test_compressed_text_is_ignored() -> None:
    bomb = zeros(2**28)
    assert read(chunk(b"zTXt", b"Seed\0\0" + bomb), chunk(b"iTXt", b"Digit\0\1\0\0\0" + bomb)) == {}


def test_damaged_text_chunk_is_refused() -> None:
    content = b"tEXtSeed\x0042"
    damaged = struct.pack(">I", 7) + content + struct.pack(">I", zlib.crc32(content) ^ 1)
    with pytest.raises(PictureError, match="incomplete or damaged"):
        read(damaged)


def test_many_chunks_are_refused_before_their_text_is_read() -> None:
    assert read(*[text("Author", "me")] * 1000, text("Seed", "42")) == {"Seed": "42"}
    with pytest.raises(PictureError, match=f"more than {MAX_CHUNKS} chunks"):
        read(*[text("Author", "me")] * MAX_CHUNKS)


def test_names_of_all_images_of_the_largest_sheet_are_read() -> None:
    names = json.dumps(64 * [100 * "\N{GRINNING FACE}"])
    assert len(names) > 70_000
    data = encode_pixels(np.zeros((8, 8), np.uint8), text={"Label": names})
    assert read_text(data, {"Label"}) == {"Label": names}
    longer = encode_pixels(np.zeros((8, 8), np.uint8), text={"Label": "x" * MAX_LABEL_BYTES})
    with pytest.raises(PictureError, match=f"Label has more than {MAX_LABEL_BYTES} bytes"):
        read_text(longer, {"Label"})
