import base64
import io
import zipfile
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from app import VERSION
from app.engine.job import Pixels
from app.tasks.images import encode_base64, encode_image, encode_images, encode_sheet, encode_zip
from model.png import Provenance

PROVENANCE = Provenance(
    labels=("7",), seed=2**53 - 1, sampler="ddim", num_steps=20, guidance_scale=1.5, model_sha256="ab" * 32
)


def picture(number: int, *shape: int) -> Pixels:
    return np.random.default_rng(number).integers(1, 256, shape or (4, 4), dtype=np.uint8)


def pictures(count: int, *shape: int) -> list[Pixels]:
    return [picture(number, *shape) for number in range(count)]


def decode(png: bytes) -> tuple[Pixels, dict[Any, Any]]:
    with Image.open(io.BytesIO(png)) as opened:
        opened.load()
        assert opened.format == "PNG"
        return np.asarray(opened, dtype=np.uint8), opened.info


def test_png_contains_the_exact_pixels() -> None:
    pixels, chunks = decode(encode_image(picture(0)))
    assert np.array_equal(pixels, picture(0))
    assert chunks == {}


def test_scale_enlarges_each_pixel_to_a_square() -> None:
    pixels, _ = decode(encode_image(picture(0), scale=3))
    assert np.array_equal(pixels, np.kron(picture(0), np.ones((3, 3), dtype=np.uint8)))


def test_rgb_image_keeps_its_colours() -> None:
    pixels, _ = decode(encode_image(picture(0, 4, 4, 3), scale=2))
    assert pixels.shape == (8, 8, 3)
    assert np.array_equal(pixels[::2, ::2], picture(0, 4, 4, 3))
    assert np.array_equal(pixels[1::2, 1::2], picture(0, 4, 4, 3))


def test_every_png_contains_its_provenance() -> None:
    for index, png in enumerate(encode_images(pictures(3), PROVENANCE, 1)):
        pixels, chunks = decode(png)
        assert np.array_equal(pixels, picture(index))
        assert chunks == {
            "Software": f"unfog {VERSION}",
            "Digit": "7",
            "Label": "7",
            "Seed": "9007199254740991",
            "Index": str(index),
            "Sampler": "ddim",
            "Steps": "20",
            "Guidance-Scale": "1.5",
            "Model-SHA256": "ab" * 32,
        }


def test_indices_of_the_images_begin_at_the_first_index() -> None:
    pngs = encode_images(pictures(2), replace(PROVENANCE, first_index=5), 1)
    assert [decode(png)[1]["Index"] for png in pngs] == ["5", "6"]
    assert encode_sheet(pictures(1), replace(PROVENANCE, first_index=5), 1) == pngs[0]


def test_sheet_of_one_image_is_the_image() -> None:
    assert encode_sheet(pictures(1), PROVENANCE, 2) == encode_images(pictures(1), PROVENANCE, 2)[0]


@pytest.mark.parametrize(
    ("count", "columns", "rows"),
    [(2, 2, 1), (3, 2, 2), (4, 2, 2), (5, 3, 2), (7, 3, 3), (10, 4, 3), (16, 4, 4), (17, 5, 4), (64, 8, 8)],
)
@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 3)], ids=["grey", "colour"])
def test_sheet_is_row_major_without_gaps(count: int, columns: int, rows: int, shape: tuple[int, ...]) -> None:
    sheet, chunks = decode(encode_sheet(pictures(count, *shape), PROVENANCE, 1))
    assert sheet.shape[:2] == (rows * 4, columns * 4)
    for cell in range(columns * rows):
        top, left = cell // columns * 4, cell % columns * 4
        expected = picture(cell, *shape) if cell < count else np.zeros(shape, dtype=np.uint8)
        assert np.array_equal(sheet[top : top + 4, left : left + 4], expected)
    assert chunks["Index"] == f"0-{count - 1}"
    assert chunks["Seed"] == "9007199254740991"


def test_scale_enlarges_the_whole_sheet() -> None:
    small, _ = decode(encode_sheet(pictures(3), PROVENANCE, 1))
    large, _ = decode(encode_sheet(pictures(3), PROVENANCE, 2))
    assert np.array_equal(large, np.kron(small, np.ones((2, 2), dtype=np.uint8)))


def test_zip_contains_the_png_files_with_their_names() -> None:
    with zipfile.ZipFile(io.BytesIO(encode_zip(pictures(11), PROVENANCE, 2))) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [f"digit-7-seed-9007199254740991-{index}.png" for index in range(11)]
        assert [archive.read(name) for name in archive.namelist()] == encode_images(pictures(11), PROVENANCE, 2)


def test_zip_of_a_task_names_the_files_after_it() -> None:
    provenance = replace(PROVENANCE, task={"Task": "inpaint", "Mask-SHA256": "cd" * 32})
    with zipfile.ZipFile(io.BytesIO(encode_zip(pictures(2), provenance, 1))) as archive:
        assert archive.namelist() == [f"inpaint-seed-9007199254740991-{index}.png" for index in range(2)]
        _, chunks = decode(archive.read(archive.namelist()[0]))
    assert (chunks["Task"], chunks["Mask-SHA256"]) == ("inpaint", "cd" * 32)


@pytest.mark.parametrize("encode", [encode_sheet, encode_zip, encode_images])
def test_encoded_bytes_do_not_depend_on_the_time(encode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = encode(pictures(5), PROVENANCE, 2)
    monkeypatch.setattr("time.time", lambda: 2e9)
    monkeypatch.setattr("time.localtime", lambda *_: (2033, 5, 18, 3, 33, 20, 2, 138, 0))
    assert encode(pictures(5), PROVENANCE, 2) == before


def test_png_of_an_image_does_not_depend_on_the_count() -> None:
    assert encode_images(pictures(5), PROVENANCE, 1)[:2] == encode_images(pictures(2), PROVENANCE, 1)


def test_base64_decodes_to_the_same_bytes() -> None:
    png = encode_image(picture(0))
    assert base64.b64decode(encode_base64(png), validate=True) == png
