from typing import Any

import httpx
import numpy as np
import pytest

from app.engine.job import Pixels
from app.tasks.inpaint import InpaintFields, MaskedPicture
from tests.app.api.examples import REQUESTS
from tests.app.application import run
from tests.app.fakes import INFO, FakeRunner
from tests.app.picture_samples import encode, grey


@pytest.mark.parametrize("factor", [2, 10])
@pytest.mark.parametrize("offset", [0, 1], ids=["along_blocks", "across_blocks"])
def test_enlarged_picture_keeps_every_pixel_outside_of_the_mask(factor: int, offset: int) -> None:
    """Each enlarged pixel with a white pixel of the mask is filled in, and no other."""
    pixels = np.random.default_rng(factor).integers(0, 256, (28, 28), dtype=np.uint8)
    white = np.zeros((28 * factor, 28 * factor), np.uint8)
    white[14 * factor - offset :] = 255
    masked = MaskedPicture()
    fields = InpaintFields(invert=False)
    masked.read_mask((fields, INFO), encode(grey(white), "PNG"))
    image = masked.read_image((fields, INFO), encode(grey(np.kron(pixels, np.ones((factor, factor), np.uint8))), "PNG"))
    first = 14 - bool(offset)
    assert masked.redrawn[0].all(axis=1).tolist() == [row >= first for row in range(28)]
    assert not masked.redrawn[0, :first].any()
    assert np.array_equal(image.pixels[0, :first], pixels[:first])


def inpainted(mask: Pixels, image: Pixels, **options: Any) -> tuple[Pixels, Pixels]:
    """Returns the mask and the image after they were resized."""
    masked, fields = MaskedPicture(), InpaintFields(**options)
    masked.read_mask((fields, INFO), encode(grey(mask), "PNG"))
    resized = masked.read_image((fields, INFO), encode(grey(image), "PNG"))
    return masked.redrawn[0], resized.pixels[0].numpy()


def test_mask_is_white_from_grey_level_128_on() -> None:
    mask = np.full((28, 28), 127, np.uint8)
    mask[5, 6] = 128
    redrawn, _ = inpainted(mask, np.zeros((28, 28), np.uint8))
    assert redrawn.nonzero() == (np.array([5]), np.array([6]))


@pytest.mark.parametrize("size", [28, 60])
def test_pixels_under_the_mask_have_no_influence(size: int) -> None:
    """Without it, the light pixels under the mask would make the picture look like dark strokes on light paper."""
    mask, plain = np.zeros((size, size), np.uint8), np.zeros((size, size), np.uint8)
    mask[: size // 2] = mask[:, -1] = mask[:, 0] = mask[-1] = 255
    plain[size // 2 : size - 2, size // 2 : size // 2 + 2] = 200
    light = np.where(mask == 255, 255, plain).astype(np.uint8)
    (redrawn, expected), (_, found) = (inpainted(mask, each) for each in (plain, light))
    assert np.array_equal(found[~redrawn], expected[~redrawn])
    assert np.array_equal(found, expected)


def test_fit_of_the_drawing_alone_is_refused_before_the_pictures_are_decoded() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        body = {**REQUESTS["/inpaint"]["one"], "fit": "digit", "mask": "AAAA"}
        answer = (await client.post("/inpaint", json=body)).json()
        assert answer["errors"] == [
            {"loc": ["body", "fit"], "msg": "Input should be 'auto' or 'resize', because the mask must fit the image"}
        ]

    run(check, FakeRunner())
