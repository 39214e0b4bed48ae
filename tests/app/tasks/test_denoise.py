import math
from typing import Any

import httpx
import pytest

from model.noisy_image import NUM_PAIRS, ODDS_SCALE, PREDICTION_VARIANCE
from tests.app.api.examples import REQUESTS
from tests.app.application import run
from tests.app.fakes import FakeRunner, recognised_class

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
