"""Tests of the measurement of the host cost, with few images and few rounds."""

import json

import pytest

from app.engine.job import StepRows
from scripts.benchmark import host_check
from scripts.benchmark.host_check import SleepingRunner, measure_admission, measure_engine, new_job


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_check, "ROUNDS", 1)
    monkeypatch.setattr(host_check, "LOADS", {"2 x 3": (2, 3)})
    monkeypatch.setattr(host_check, "BACKLOGS", (5,))
    monkeypatch.setattr(host_check, "NUM_ADMISSIONS", 2)


@pytest.mark.parametrize("staggered", [False, True])
def test_engine_has_every_image_in_each_measured_step(monkeypatch: pytest.MonkeyPatch, staggered: bool) -> None:
    sizes = list[int]()

    class Recording(SleepingRunner):
        def step(self, rows, before_call=lambda: None):  # type: ignore[no-untyped-def]
            sizes.append(len(rows.trajectories))
            return super().step(rows, before_call)

    monkeypatch.setattr(host_check, "SleepingRunner", Recording)
    assert measure_engine(4, 3, staggered=staggered) > 0
    assert set(sizes[host_check.NUM_STEPS + 5 :]) == {12}


def test_admission_of_one_image_takes_cpu_time() -> None:
    assert measure_admission(20) > 0


def test_sleeping_runner_generates_images_of_the_shape_of_the_checkpoint() -> None:
    (row,) = new_job().unfinished
    runner = SleepingRunner()
    assert runner.step(StepRows.of([row])) == []
    assert [image.shape for image in runner.pixels([row]).wait()] == [(28, 28)]


def test_parts_print_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for part in ("engine", "admission", "operations"):
        host_check.main([part])
        found[part] = json.loads(capsys.readouterr().out)
    assert set(found["engine"]) == {"2 x 3", "2 x 3, staggered"}
    assert set(found["admission"]) == {"5"}
    assert found["operations"]["guided"]["network"] == found["operations"]["plain"]["network"] > 50
