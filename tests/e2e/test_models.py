"""Two models in one service: each uses its own defaults and generates the same bytes as alone."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from model.checkpoint import CheckpointConfig, Probe, save
from model.schedule import ScheduleConfig
from tests.e2e.conftest import Start
from tests.e2e.service import Service, open_png
from tests.tiny import tiny_unet

FAST: dict[str, Any] = {"digit": 4, "seed": 3, "count": 2, "model": "fast"}
DEFAULT: dict[str, Any] = {"digit": 4, "seed": 3, "count": 2, "num_steps": 30}


@pytest.fixture(scope="module")
def fast_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a checkpoint with different weights that permits 4 or 2 steps."""
    network = tiny_unet(image_size=28, widths=(16, 16))
    path = tmp_path_factory.mktemp("fast_model_path") / "fast.safetensors"
    probe = Probe(num_steps=4)
    save(
        path, network, CheckpointConfig(network.config, ScheduleConfig(), samplers=("ddim",), steps=(4, 2), probe=probe)
    )
    return path


@pytest.fixture
def two_models(start: Start, fast_model_path: Path) -> Service:
    return start(UNFOG_FAST_CHECKPOINT=str(fast_model_path), UNFOG_MAX_BATCH="32")


def test_each_model_generates_the_same_bytes_while_the_other_runs(two_models: Service) -> None:
    bodies = [FAST, DEFAULT, {**FAST, "num_steps": 2}]
    alone = [two_models.images(**body) for body in bodies]
    assert alone[0] != alone[2]
    with ThreadPoolExecutor() as pool:
        others = [
            pool.submit(two_models.images, digit=digit, count=12, **options)
            for digit in range(3)
            for options in ({"num_steps": 40}, {"model": "fast"})
        ]
        assert list(pool.map(lambda body: two_models.images(**body), bodies)) == alone
        assert all(len(other.result()) == 12 for other in others)


def test_fast_model_uses_its_own_defaults_and_reports_them(two_models: Service, fast_model_path: Path) -> None:
    response = two_models.client.post("/generate", json=FAST).json()
    assert (response["num_steps"], response["sampler"], response["guidance_scale"]) == (4, "ddim", 1)
    sha256 = hashlib.sha256(fast_model_path.read_bytes()).hexdigest()
    assert response["model"] == {"name": "fast", "sha256": sha256}
    _, text, _ = open_png(two_models.images(**FAST)[0])
    assert (text["Steps"], text["Model-SHA256"]) == ("4", sha256)
    models = two_models.client.get("/health").json()["models"]
    assert {model["name"]: model["sha256"] for model in models}["fast"] == sha256


def test_options_that_only_the_other_model_permits_are_422(two_models: Service) -> None:
    for wrong in ({"num_steps": 3}, {"sampler": "ddpm"}, {"guidance_scale": 2}):
        response = two_models.client.post("/generate", json={**FAST, **wrong})
        assert (response.status_code, response.json()["errors"][0]["loc"]) == (422, ["body", next(iter(wrong))])
