"""Reads the PNG files back with Pillow."""

import io

import numpy as np
from PIL import Image

from model.png import SOFTWARE, Provenance, encode_png

PROVENANCE = Provenance(
    digit=7, seed=2**53 - 1, sampler="ddim", num_steps=20, guidance_scale=1.5, model_sha256="ab" * 32
)


def test_text_chunks_contain_all_generation_parameters() -> None:
    png = encode_png(Image.new("L", (2, 3)), text=PROVENANCE.text(4))
    with Image.open(io.BytesIO(png)) as image:
        assert image.info == {
            "Software": SOFTWARE,
            "Digit": "7",
            "Seed": "9007199254740991",
            "Index": "4",
            "Sampler": "ddim",
            "Steps": "20",
            "Guidance-Scale": "1.5",
            "Model-SHA256": "ab" * 32,
        }


def test_scale_enlarges_each_pixel_to_a_square() -> None:
    pixels = np.array([[0, 100], [200, 255]], dtype=np.uint8)
    with Image.open(io.BytesIO(encode_png(Image.fromarray(pixels), scale=3))) as image:
        assert np.array_equal(np.asarray(image), np.kron(pixels, np.ones((3, 3), np.uint8)))
        assert image.info == {}
