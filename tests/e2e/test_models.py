"""Two models in one loop: each draws what it would alone, by its own recommendation."""

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

STUDENT: dict[str, Any] = {"digit": 4, "seed": 3, "count": 2, "model": "fast"}
TEACHER: dict[str, Any] = {"digit": 4, "seed": 3, "count": 2, "num_steps": 30}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights than the first model's, for four steps or two."""
    network = tiny_unet(image_size=28, widths=(16, 16))
    path = tmp_path_factory.mktemp("student") / "fast.safetensors"
    probe = Probe(num_steps=4)
    save(
        path, network, CheckpointConfig(network.config, ScheduleConfig(), samplers=("ddim",), steps=(4, 2), probe=probe)
    )
    return path


@pytest.fixture
def both(start: Start, student: Path) -> Service:
    return start(UNFOG_FAST_CHECKPOINT=str(student), UNFOG_MAX_BATCH="32")


def test_each_model_draws_the_same_bytes_in_the_others_company(both: Service) -> None:
    asked = [STUDENT, TEACHER, {**STUDENT, "num_steps": 2}]
    alone = [both.images(**body) for body in asked]
    assert alone[0] != alone[2]
    with ThreadPoolExecutor() as pool:
        others = [
            pool.submit(both.images, digit=digit, count=12, **how)
            for digit in range(3)
            for how in ({"num_steps": 40}, {"model": "fast"})
        ]
        assert list(pool.map(lambda body: both.images(**body), asked)) == alone
        assert all(len(other.result()) == 12 for other in others)


def test_a_student_draws_in_its_own_few_steps_and_says_so(both: Service, student: Path) -> None:
    answer = both.client.post("/generate", json=STUDENT).json()
    assert (answer["num_steps"], answer["sampler"], answer["guidance_scale"]) == (4, "ddim", 1)
    sha256 = hashlib.sha256(student.read_bytes()).hexdigest()
    assert answer["model"] == {"name": "fast", "sha256": sha256}
    _, text, _ = open_png(both.images(**STUDENT)[0])
    assert (text["Steps"], text["Model-SHA256"]) == ("4", sha256)
    models = both.client.get("/health").json()["models"]
    assert {model["name"]: model["sha256"] for model in models}["fast"] == sha256


def test_what_only_the_other_model_can_do_is_refused(both: Service) -> None:
    for wrong in ({"num_steps": 3}, {"sampler": "ddpm"}, {"guidance_scale": 2}):
        refused = both.client.post("/generate", json={**STUDENT, **wrong})
        assert (refused.status_code, refused.json()["errors"][0]["loc"]) == (422, ["body", next(iter(wrong))])
