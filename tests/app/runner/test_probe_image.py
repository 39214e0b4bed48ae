"""Tests of warm-up: the check of the probe image and the measured step times."""

import dataclasses
import time
from pathlib import Path

import pytest
import torch

from app.engine.interface import RunnerError
from app.runner.runner import Runner
from app.runner.threads import ComputeThreads
from model.checkpoint import Checkpoint, load
from model.spec import SHIPPED, SHIPPED_FAST
from tests.app.runner.rows import CPU, DTYPES, GREY_AND_COLOUR, CountingNetwork, new_runner


def test_warm_up_checks_the_probe_image_of_each_model(loaded: Checkpoint, other: Checkpoint) -> None:
    wrong = dataclasses.replace(other, probe_image=-other.probe_image)
    with pytest.raises(RunnerError, match="probe image of model 'fast'"):
        Runner({"default": loaded, "fast": wrong}, CPU, torch.float32).warm_up(lambda: True)


def test_warm_up_measures_step_times_and_releases_all_slots(loaded: Checkpoint) -> None:
    runner = new_runner(loaded)
    before = len(runner._slots["default"]._free)
    step_times = runner.warm_up(lambda: False)
    assert step_times.step_seconds(64) > 0
    assert len(runner._slots["default"]._free) == before


@pytest.mark.parametrize(("seconds", "expected"), [({4: 1.0, 3: 2.0}, 1.0), ({4: 9.0, 3: 2.0}, 2.0)])
def test_warm_up_returns_the_step_times_of_the_fastest_number_of_threads(
    loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], expected: float
) -> None:
    used: list[int] = []

    def measure(*arguments: object) -> dict[int, float]:
        return {1: seconds[used[-1]], 64: seconds[used[-1]]}

    monkeypatch.setattr("app.runner.runner.measure_step_times", measure)
    runner = Runner({"default": loaded}, CPU, torch.float32, ComputeThreads((4, 3), used.append))
    assert runner.warm_up(bool).step_seconds(64) == expected


def test_step_times_are_measured_once_for_models_with_the_same_network(
    loaded: Checkpoint, other: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def measure(runner: Runner, model: str, *arguments: object) -> dict[int, float]:
        measured.append(model)
        return {1: 2.0 if model == "default" else 3.0}

    monkeypatch.setattr("app.runner.runner.measure_step_times", measure)
    for fast, names, seconds in ((loaded, ["default"], 2.0), (other, ["default", "fast"], 3.0)):
        runner = Runner({"default": loaded, "fast": fast}, CPU, torch.float32)
        monkeypatch.setattr(runner, "check", lambda: None)
        measured.clear()
        assert runner.warm_up(bool).of("fast").seconds(1) == seconds
        assert measured == names


def test_probe_image_is_generated_with_the_smallest_number_of_threads(
    loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If another process used a core, all threads would wait for each other, and a step could take seconds."""
    used: list[int] = []
    used_before = list[list[int]]()
    monkeypatch.setattr("app.runner.runner.check_probe_image", lambda *arguments: used_before.append(list(used)))
    Runner({"default": loaded}, CPU, torch.float32, ComputeThreads((4, 3), used.append)).warm_up(lambda: True)
    assert [before[-1] for before in used_before] == [3]
    assert used[-1] == 4  # All threads are used after warm-up.


def test_warm_up_generates_only_the_probe_image_if_it_should_stop(loaded: Checkpoint) -> None:
    runner = new_runner(loaded)
    network = CountingNetwork(runner)
    runner.warm_up(lambda: True)
    assert len(network.rows) == loaded.config.probe.num_steps  # only the steps of the probe image


@GREY_AND_COLOUR
@DTYPES
def test_warm_up_raises_if_the_probe_image_differs(loaded: Checkpoint, dtype: torch.dtype) -> None:
    wrong = dataclasses.replace(loaded, probe_image=-loaded.probe_image)
    with pytest.raises(RunnerError, match="probe image"):
        new_runner(wrong, dtype).warm_up(lambda: True)


def test_warm_up_raises_if_the_probe_image_has_nan(loaded: Checkpoint) -> None:
    loaded.network.final_conv[0].bias[:] = torch.nan  # type: ignore[operator] # it is a Conv2d
    with pytest.raises(RunnerError, match="probe image"):
        new_runner(loaded).warm_up(lambda: True)


@pytest.mark.parametrize("path", [SHIPPED, SHIPPED_FAST], ids=["default", "fast"])
def test_float16_generates_the_probe_image_of_a_shipped_checkpoint(path: Path) -> None:
    """Checks that float16 has enough range. It runs on a CPU, so that it does not check the kernels of a GPU."""
    Runner({"default": load(path)}, CPU, torch.float16).warm_up(lambda: True)


@pytest.mark.parametrize(("device", "counts_waiting"), [("cpu", False), ("cuda", True)])
def test_work_of_a_step_excludes_waiting_on_a_cpu_but_not_on_a_gpu(
    loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch, device: str, counts_waiting: bool
) -> None:
    runner = new_runner(loaded)
    monkeypatch.setattr(runner, "step", lambda rows: time.sleep(0.05))
    runner.device = torch.device(device)
    seconds, worked = runner._time_step([])
    assert (worked == seconds) is counts_waiting
    assert worked <= seconds
