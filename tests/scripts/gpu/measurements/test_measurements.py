"""Runs every measurement with a tiny network, on a CPU and on a simulated GPU."""

import math
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from app.engine.interface import DeviceLostError, OutOfMemoryError
from app.engine.job import StepRows, Trajectory
from app.runner.runner import Runner
from scripts.gpu.measurements import correctness, facts, failures, invariance, start, steps, synchronisations
from scripts.gpu.measurements.engines import StepEvents, idle_share
from scripts.gpu.measurements.figures import Figure
from scripts.gpu.measurements.machine import HostEvent, Kind, Machine
from tests.scripts.gpu.measurements.pretended import PretendedGpu


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"COPY_BYTES": 1 << 20, "CPU_COPY_BYTES": 1 << 20, "MATRIX": 64, "CPU_MATRIX": 64}.items():
        monkeypatch.setattr(facts, name, value)
    monkeypatch.setattr(facts, "NUM_LAUNCHES", 5)
    monkeypatch.setattr(steps, "NUM_CALLS", 2)
    monkeypatch.setattr(steps, "STEP_SECONDS", 0.0)
    monkeypatch.setattr(invariance, "NUM_STEPS", 3)


def by_name(figures: Iterable[Figure]) -> dict[str, Figure]:
    """Returns the figures by name. No name may occur twice, and no number may be missing, infinite or negative."""
    listed = list(figures)
    found = {figure.name: figure for figure in listed}
    assert len(found) == len(listed)
    for figure in listed:
        assert figure.skipped or figure.value is not None
        assert not isinstance(figure.value, float) or (math.isfinite(figure.value) and figure.value >= 0), figure
    return found


def failed(figures: dict[str, Figure]) -> list[str]:
    return [name for name, figure in figures.items() if figure.passed is False]


def test_facts_of_a_cpu(cpu: Machine) -> None:
    found = by_name(facts.measure_on(cpu))
    assert found["torch"].value == torch.__version__
    assert found["GPU"].skipped == "no GPU"
    rate, flop = (found[name].value for name in ("matrix rate", "one evaluation of the network"))
    assert isinstance(rate, float) and isinstance(flop, float)
    images = found["highest rate of images with 10 steps without guidance"].value
    assert images == pytest.approx(rate * 1e12 / (flop * 1e9 * 10))


def test_facts_of_a_gpu(gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="H100", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = by_name(facts.measure_on(gpu))
    assert (found["GPU"].value, found["compute capability"].value, found["memory"].value) == ("H100", "9.0", 80)
    assert "launch of a graph of one kernel, device" in found


@pytest.mark.parametrize("is_gpu", [False, True])
def test_right_images_and_noise_pass_the_checks(cpu: Machine, gpu: PretendedGpu, is_gpu: bool) -> None:
    found = by_name(correctness.measure_on(gpu if is_gpu else cpu))
    assert failed(found) == []
    assert found["random words that differ from the CPU"].passed
    assert ("images of graph and eager, mean difference" in found) == is_gpu


def test_wrong_noise_fails_the_check(cpu: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def wrong(*arguments: object) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.zeros(4, 2, 3, dtype=torch.int64) + calls

    monkeypatch.setattr(correctness, "random_words", wrong)
    assert failed(by_name(correctness.noise(cpu))) == ["random words that differ from the CPU"]


def test_gpu_tests_are_skipped_without_a_gpu(cpu: Machine) -> None:
    assert correctness.gpu_tests(cpu).skipped == "no GPU"


@pytest.mark.parametrize(("body", "passed", "text"), [("assert 0", False, "1 failed"), (None, None, "")])
def test_gpu_tests_are_run(
    gpu: PretendedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, passed: bool, text: str
) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    mark = "pytest" + ".mark.gpu"
    if body:
        (tests / "test_one.py").write_text(f"import pytest\n@{mark}\ndef test_one():\n    {body}\n")
    monkeypatch.setattr(correctness, "TESTS", tests)
    figure = correctness.gpu_tests(gpu)
    assert figure.passed is passed
    assert text in str(figure.value)
    assert bool(figure.skipped) == (body is None)


@pytest.mark.parametrize("is_gpu", [False, True])
def test_images_of_a_cpu_have_equal_bytes_in_every_batch(cpu: Machine, gpu: PretendedGpu, is_gpu: bool) -> None:
    found = by_name(invariance.measure_on(gpu if is_gpu else cpu, (2, 4), fixed_rows=4))
    shares = {name: figure for name, figure in found.items() if name.startswith("equal bytes") and not figure.skipped}
    assert len(shares) == (12 if is_gpu else 4)
    assert {figure.value for figure in shares.values()} == {100}
    assert {figure.value for name, figure in found.items() if name.startswith("first layer")} == {"none"}
    assert failed(found) == []


def test_first_layer_that_depends_on_the_batch_is_found(cpu: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    load = cpu.load

    def load_with_fault(**options: bool) -> dict[str, object]:
        models = load(**options)
        middle = models["default"].network.mids[0]
        forward = middle.forward
        middle.forward = lambda x, c: forward(x, c) * (1 + len(x))  # type: ignore[method-assign]
        return models  # type: ignore[return-value]

    monkeypatch.setattr(cpu, "load", load_with_fault)
    found = by_name(invariance.measure_on(cpu, (2,)))
    assert str(found["first layer that differs, eager, plain, last of 2 rows"].value).startswith("mids.0 (by ")
    assert "equal bytes, eager, plain, one of 2 rows, at 0, 1" in failed(found)


def test_positions_are_the_first_a_middle_and_the_last_one() -> None:
    assert [invariance.positions_in(size) for size in (2, 4, 512)] == [[0, 1], [0, 1, 3], [0, 255, 511]]


def test_waits_are_counted_for_each_runner_and_kind_of_call(gpu: PretendedGpu) -> None:
    found = by_name(synchronisations.measure_on(gpu))
    calls = ("first step", "further step", "reading")
    assert {name: figure.value for name, figure in found.items()} == {
        f"waits, {kind}, {call}": 0 for kind in ("eager", "graph") for call in calls
    }


@pytest.mark.parametrize("kind", ["eager", "graph"])
def test_steps_of_a_gpu_have_their_times_and_kernels(gpu: PretendedGpu, kind: Kind) -> None:
    found = by_name(steps.measure_runners(gpu, {kind: gpu.runner(kind)}, (1, 4)))
    assert len([name for name in found if name.startswith("device, step")]) == 5
    assert found[f"kernels of a step, {kind}, 4 mixed"].value
    kernels = found[f"sum of the kernels, {kind}, 4 mixed"]
    assert len(kernels.detail) == 5 and kernels.as_json()["detail"] == kernels.detail
    assert found[f"kernel with the longest time, {kind}, 4 mixed"].value == next(iter(kernels.detail))


def test_all_times_are_measured_before_the_first_profile(gpu: PretendedGpu) -> None:
    runners = {kind: gpu.runner(kind) for kind in gpu.kinds()}
    names = [figure.name for figure in steps.measure_runners(gpu, runners, (1,))]
    is_time = [name.startswith(("host", "device")) for name in names]
    assert is_time == sorted(is_time, reverse=True)
    assert sum(is_time) == 8


def test_steps_of_a_cpu_have_host_times_and_operations(cpu: Machine) -> None:
    found = by_name(steps.measure_runners(cpu, {"eager": cpu.runner("eager")}, (1,)))
    operations = found["tensor operations of a step, eager"].value
    assert isinstance(operations, int) and operations > 50
    assert [name for name in found if name.startswith("host")] == [
        "host, call of a step, eager, 1 plain",
        "host, call of a step, eager, 1 guided",
    ]


def test_step_without_memory_is_skipped(cpu: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = cpu.runner("eager")
    step = runner.step

    def limited(rows: StepRows) -> list[Trajectory]:
        if len(rows.trajectories) > 1:
            raise OutOfMemoryError
        return step(rows)

    monkeypatch.setattr(runner, "step", limited)
    found = by_name(steps.measure_runners(cpu, {"eager": runner}, (1, 2)))
    assert found["step, eager, 2 plain"].skipped == "out of memory"
    assert "host, call of a step, eager, 1 plain" in found


def test_compiled_steps_are_measured(gpu: PretendedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, compiled = gpu.runner("graph"), []
    monkeypatch.setattr(runner, "compile", lambda cache, *, must: compiled.append(must))
    found = by_name(steps.compiled_on(gpu, runner, tmp_path, (1,)))
    assert compiled == [True]
    assert "compilation and first image" in found
    assert "device, step, compiled, 1 plain" in found


def test_device_is_idle_between_steps_and_before_a_call_without_new_rows() -> None:
    def step(entry: float, call: float, end: float, *, has_new_rows: bool = False) -> StepEvents:
        return StepEvents(HostEvent(entry), HostEvent(call), HostEvent(end), has_new_rows)

    events = [step(0, 1, 2), step(3, 4, 6, has_new_rows=True), step(7, 9, 12)]
    assert idle_share(events) == pytest.approx((1 + 1 + 2) / 10)


def test_engine_recovers_from_a_shortage_of_memory(gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[Tensor] = []
    make = gpu.runner

    def runner_with_little_memory(*arguments: Kind) -> Runner:
        runner = make(*arguments)
        step = runner.step

        def limited(rows: StepRows, before_call: object = None) -> list[Trajectory]:
            if blocks and len(rows.trajectories) > 2:
                raise OutOfMemoryError
            return step(rows)

        runner.step = limited  # type: ignore[method-assign, assignment]
        return runner

    def fill(bytes_left: int) -> list[Tensor]:
        blocks.append(torch.zeros(0))
        return blocks

    monkeypatch.setattr(gpu, "runner", runner_with_little_memory)
    monkeypatch.setattr(gpu, "fill_memory", fill)
    found = by_name(failures.shortage(gpu, "eager", count=8))
    assert failed(found) == []
    assert found["eager: steps that ran out of memory"].value


def test_wrong_image_after_a_shortage_fails_the_check(gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    images = iter([[np.zeros((8, 8))], [np.zeros((8, 8))], [np.full((8, 8), 90.0)]])
    monkeypatch.setattr(failures, "images_of", lambda engine, job: next(images))
    monkeypatch.setattr(gpu, "fill_memory", lambda bytes_left: [])
    assert "graph: one image afterwards" in failed(by_name(failures.shortage(gpu, "graph", count=8)))


@pytest.mark.parametrize(
    ("error", "passed"), [(DeviceLostError("lost"), True), (IndexError("out of range"), False), (None, False)]
)
def test_check_of_an_error_in_a_kernel_passes_only_for_a_lost_device(
    gpu: PretendedGpu, error: Exception | None, passed: bool
) -> None:
    runner = gpu.runner("graph")
    runner.check()

    def step(rows: StepRows) -> list[Trajectory]:
        assert rows.trajectories[0].label == failures.NO_CLASS
        if error:
            raise error
        return []

    runner.check = lambda: setattr(runner, "step", step)  # type: ignore[method-assign]
    figure = failures.device_assert(runner, "graph")
    assert figure.passed is passed
    assert str(figure.value) == (f"{type(error).__name__}: {error}" if error else "none")


def test_label_that_does_not_exist_is_an_error_of_the_real_runner(gpu: PretendedGpu) -> None:
    assert str(failures.device_assert(gpu.runner("eager"), "eager").value).startswith("IndexError")


def test_start_counts_the_captured_graphs(gpu: PretendedGpu) -> None:
    found = by_name(start.measure_on(gpu, 60.0, num_slots=64, most_rows=4))
    ready, every = found["graphs captured when ready"].value, found["graphs captured after idle time (all)"]
    assert isinstance(ready, int) and isinstance(every.value, int)
    assert 6 <= ready < every.value
    assert found["reserved memory when ready"].value == 3
    assert found["decrease of the free memory in idle time"].value == 0


def test_age_of_the_process_increases() -> None:
    first, second = start.process_seconds(), start.process_seconds()
    assert first is not None and second is not None and 0 < first <= second
