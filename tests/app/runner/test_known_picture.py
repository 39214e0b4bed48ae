"""Warming up: the known picture, and how long steps take."""

import dataclasses
import time
from pathlib import Path

import pytest
import torch

from app.engine.interface import RunnerError
from app.engine.step_times import StepTimes
from app.runner.runner import Runner
from app.runner.threads import ComputeThreads
from model.checkpoint import SHIPPED, SHIPPED_FAST, Checkpoint, load
from tests.app.runner.rows import CPU, DTYPES, Counting, new_runner


def test_the_picture_that_is_known_of_each_model_is_drawn_by_that_model(loaded: Checkpoint, other: Checkpoint) -> None:
    wrong = dataclasses.replace(other, probe_image=-other.probe_image)
    with pytest.raises(RunnerError, match="known picture of model 'fast'"):
        Runner({"default": loaded, "fast": wrong}, CPU, torch.float32).warm_up(lambda: True)


def test_warming_up_measures_steps_and_leaves_nothing_behind(loaded: Checkpoint) -> None:
    runner = new_runner(loaded)
    before = len(runner._slots._free)
    step_times = runner.warm_up(lambda: False)
    assert step_times.step_seconds(64) > 0
    assert len(runner._slots._free) == before


@pytest.mark.parametrize(("seconds", "expected"), [({4: 1.0, 3: 2.0}, 1.0), ({4: 9.0, 3: 2.0}, 2.0)])
def test_the_step_times_are_those_of_the_number_of_threads_that_is_the_fastest(
    loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], expected: float
) -> None:
    used: list[int] = []

    def measure(*arguments: object) -> StepTimes:
        return StepTimes({1: seconds[used[-1]], 64: seconds[used[-1]]})

    monkeypatch.setattr("app.runner.runner.measure_step_times", measure)
    runner = Runner({"default": loaded}, CPU, torch.float32, ComputeThreads((4, 3), used.append))
    assert runner.warm_up(bool).step_seconds(64) == expected


def test_the_known_picture_is_drawn_by_as_many_threads_as_a_busy_core_leaves(
    loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them would wait for each other, and for seconds a step."""
    used: list[int] = []
    seen = list[list[int]]()
    monkeypatch.setattr("app.runner.runner.check_known_picture", lambda *arguments: seen.append(list(used)))
    Runner({"default": loaded}, CPU, torch.float32, ComputeThreads((4, 3), used.append)).warm_up(lambda: True)
    assert [before[-1] for before in seen] == [3]
    assert used[-1] == 4  # with which it goes on


def test_warming_up_stops_when_asked(loaded: Checkpoint) -> None:
    runner = new_runner(loaded)
    network = Counting(runner)
    runner.warm_up(lambda: True)
    assert len(network.rows) == loaded.config.probe.num_steps  # the probe alone


@DTYPES
def test_a_machine_that_draws_the_known_picture_wrong_does_not_serve(loaded: Checkpoint, dtype: torch.dtype) -> None:
    wrong = dataclasses.replace(loaded, probe_image=-loaded.probe_image)
    with pytest.raises(RunnerError, match="known picture"):
        new_runner(wrong, dtype).warm_up(lambda: True)


def test_a_known_picture_of_nan_is_wrong(loaded: Checkpoint) -> None:
    loaded.network.final_conv[0].bias[:] = torch.nan  # type: ignore[operator] # it is a Conv2d
    with pytest.raises(RunnerError, match="known picture"):
        new_runner(loaded).warm_up(lambda: True)


@pytest.mark.parametrize("path", [SHIPPED, SHIPPED_FAST], ids=["default", "fast"])
def test_float16_draws_the_known_picture_of_a_shipped_checkpoint(path: Path) -> None:
    """On a CPU, which the service refuses for float16: this checks the range of the numbers, not a GPU's kernels."""
    Runner({"default": load(path)}, CPU, torch.float16).warm_up(lambda: True)


@pytest.mark.parametrize(("device", "counts_waiting"), [("cpu", False), ("cuda", True)])
def test_the_time_on_the_core_counts_on_a_cpu_and_the_whole_time_on_a_gpu(
    loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch, device: str, counts_waiting: bool
) -> None:
    runner = new_runner(loaded)
    monkeypatch.setattr(runner, "step", lambda rows: time.sleep(0.05))
    runner.device = torch.device(device)
    seconds, worked = runner._time_step([])
    assert (worked == seconds) is counts_waiting
    assert worked <= seconds
