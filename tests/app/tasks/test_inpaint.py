import math
from typing import Any

import httpx
import numpy as np
import pytest

from app.engine.job import Pixels
from app.tasks.inpaint import InpaintFields, MaskedPicture
from model.noisy_image import NUM_PAIRS, ODDS_SCALE, PREDICTION_VARIANCE
from tests.app.api.examples import PICTURE_TASKS, REQUESTS
from tests.app.application import run
from tests.app.fakes import INFO, FakeRunner, recognised_class
from tests.app.picture_samples import encode, grey

NOISY: dict[str, Any] = REQUESTS["/denoise"]["sample"]


@pytest.mark.parametrize("noise_std", [50.0, 300.0])
def test_denoise_returns_the_probabilities_of_its_search(noise_std: float) -> None:
    runner = FakeRunner(error_of=lambda row, label: 1.0 if label == recognised_class(row.job) else 3.0)

    async def check(client: httpx.AsyncClient) -> None:
        answer = (await client.post("/denoise", json={**NOISY, "seed": 4, "noise_std": noise_std, "count": 2})).json()
        k = ODDS_SCALE / ((noise_std / 127.5) ** 2 + PREDICTION_VARIANCE)
        odds = [1.0 if digit == answer["digit"] else math.exp(-k * 2.0 * 2 * NUM_PAIRS) for digit in range(10)]
        expected = [each / sum(odds) for each in odds]
        assert answer["probabilities"] == pytest.approx(expected, abs=5.1e-5)
        assert answer["probabilities"] == [round(each, 4) for each in answer["probabilities"]]

    run(check, runner)


@pytest.mark.parametrize("changed", [{"digit": 7}, {"mode": "mean"}, {"noise_std": 900}, {"noise_std": 0}], ids=str)
def test_probabilities_are_null_without_a_search(changed: dict[str, Any]) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        answer = (await client.post("/denoise", json=NOISY | changed)).json()
        assert answer["probabilities"] is None

    run(check, FakeRunner())


@pytest.mark.parametrize("path", ["/inpaint", "/edit"])
def test_searches_of_other_tasks_return_no_probabilities(path: str) -> None:
    body = {name: value for name, value in REQUESTS[path]["one"].items() if name != "digit"}

    async def check(client: httpx.AsyncClient) -> None:
        answer = (await client.post(path, json=body)).json()
        assert answer["digit"] is not None
        assert "probabilities" not in answer

    run(check, FakeRunner())


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


@pytest.mark.parametrize("strength", [0.5, 1])
def test_edit_of_full_strength_starts_from_noise_alone(strength: float) -> None:
    runner = FakeRunner()

    async def check(client: httpx.AsyncClient) -> None:
        body = {**REQUESTS["/edit"]["one"], "digit": 3, "strength": strength}
        assert (await client.post("/edit", json=body)).status_code == 200
        start = runner.calls[0][0].input
        assert start is not None
        assert ((start.signal, start.noise) == (0.0, 1.0)) is (strength == 1)
        assert start.signal**2 + start.noise**2 == pytest.approx(1)

    run(check, runner)


@pytest.mark.parametrize("path", PICTURE_TASKS)
def test_unknown_model_is_refused_before_the_picture_is_decoded(path: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        masks = {"mask": "AAAA"} if path == "/inpaint" else {}
        response = await client.post(path, json={"image": "AAAA", "model": "none", **masks})
        assert response.status_code == 422
        assert response.json()["errors"][0]["loc"] == ["body", "model"]

    run(check, FakeRunner())


def test_fit_of_the_drawing_alone_is_refused_before_the_pictures_are_decoded() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        body = {**REQUESTS["/inpaint"]["one"], "fit": "digit", "mask": "AAAA"}
        answer = (await client.post("/inpaint", json=body)).json()
        assert answer["errors"] == [
            {"loc": ["body", "fit"], "msg": "Input should be 'auto' or 'resize', because the mask must fit the image"}
        ]

    run(check, FakeRunner())
