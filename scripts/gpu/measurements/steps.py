"""Measures the duration of a step on the host and on the device, and finds the kernels that take the most time."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from app.engine.interface import OutOfMemoryError
from app.engine.job import DEFAULT_MODEL, StepRows
from app.runner.runner import Runner
from model.compiled.compiler import CompilerError
from model.compiled.kernel_cache import prepare_kernel_cache
from scripts.benchmark.operations import Operations
from scripts.gpu.measurements.figures import Figure, Options, Skipped, guarded
from scripts.gpu.measurements.machine import Machine, open_gpu, open_machine
from scripts.gpu.measurements.rows import ROW_KINDS, new_rows

SIZES, CPU_SIZES = (1, 4, 16, 64, 256, 512), (1, 4)
NUM_CALLS = 10  # number of calls whose median is the host time
STEP_SECONDS = 0.2  # minimum total duration of the steps whose device time is measured
LONGEST_NAME = 60  # maximum number of characters of the name of a kernel


def measure(options: Options) -> Iterator[Figure]:
    """Yields the figures of steps that are not compiled."""
    machine = open_machine(options)
    sizes = SIZES if machine.is_gpu else CPU_SIZES
    yield from measure_runners(machine, {kind: machine.runner(kind) for kind in machine.kinds()}, sizes)


def measure_compiled(options: Options) -> Iterator[Figure]:
    """Yields the figures of compiled steps in graphs. Needs a GPU, Triton and a C compiler."""
    machine = open_gpu(options)
    if find_spec("triton") is None:
        raise Skipped("needs triton")
    with tempfile.TemporaryDirectory(prefix="unfog-") as folder:
        # In a read-only container, files can be executed only in the cache folder of the service.
        cache = Path(os.environ.get("UNFOG_CACHE_DIR") or folder)
        try:
            prepare_kernel_cache(cache)
        except CompilerError as error:
            raise Skipped(str(error)) from error
        yield from compiled_on(machine, machine.runner("graph"), cache, SIZES)


def compiled_on(machine: Machine, runner: Runner, cache: Path, sizes: Sequence[int]) -> Iterator[Figure]:
    """Compiles the step of a runner and yields its figures."""
    start = time.perf_counter()
    runner.compile(cache, must=True)
    runner.check()
    yield Figure("compilation and first image", time.perf_counter() - start, "s")
    yield from measure_runners(machine, {"compiled": runner}, sizes)


def measure_runners(machine: Machine, runners: Mapping[str, Runner], sizes: Sequence[int]) -> Iterator[Figure]:
    """Yields the figures of each runner for all numbers of rows. The keys of `runners` are their names.

    All times are measured before the first profile, because steps can take longer after it.
    """
    for name, runner in runners.items():
        yield from _each(machine, runner, name, sizes, _times)
    for name, runner in runners.items():
        yield from guarded(f"tensor operations of a step, {name}", _operations(runner, name))
        if machine.is_gpu:
            yield from _each(machine, runner, name, sizes, _kernels)


def _each(
    machine: Machine,
    runner: Runner,
    name: str,
    sizes: Sequence[int],
    measure: Callable[[Machine, Runner, StepRows, str], Iterator[Figure]],
) -> Iterator[Figure]:
    """Yields the figures of steps of each size and kind."""
    for size in sizes:
        for kind in ROW_KINDS if size > 1 else ROW_KINDS[:2]:
            text = f"{name}, {size} {kind}"
            rows = StepRows.of(new_rows(runner.models[DEFAULT_MODEL], size, kind))
            try:
                _prepare(runner, rows)
                yield from guarded(f"step, {text}", measure(machine, runner, rows, text))
            except OutOfMemoryError:
                yield Figure(f"step, {text}", skipped="out of memory")
            finally:
                runner.release(rows.trajectories)


def _prepare(runner: Runner, rows: StepRows) -> None:
    """Loads the kernels of a step and captures its graph. The rows stay at the same step."""
    for _ in range(3):
        runner.step(rows)
        while runner.has_idle_work:  # A step can use a larger graph until its own graph is captured.
            runner.idle()


def _operations(runner: Runner, name: str) -> Iterator[Figure]:
    """Yields the number of tensor operations that a step enqueues one by one."""
    rows = StepRows.of(new_rows(runner.models[DEFAULT_MODEL], 1, "plain"))
    _prepare(runner, rows)
    with Operations() as operations:
        runner.step(rows)
    yield Figure(f"tensor operations of a step, {name}", operations.counts.total())
    runner.release(rows.trajectories)


def _times(machine: Machine, runner: Runner, rows: StepRows, text: str) -> Iterator[Figure]:
    host = statistics.median(_call_seconds(machine, runner, rows) for _ in range(NUM_CALLS))
    yield Figure(f"host, call of a step, {text}", host * 1e3, "ms")
    if machine.is_gpu:
        yield Figure(f"device, step, {text}", _device_seconds(machine, runner, rows) * 1e3, "ms")


def _kernels(machine: Machine, runner: Runner, rows: StepRows, text: str) -> Iterator[Figure]:
    profile = machine.profile(lambda: _run(runner, rows))
    yield Figure(f"kernels of a step, {text}", profile.kernels)
    yield Figure(f"launches of a step, {text}", profile.launches)
    longest = {name: seconds * 1e3 for name, seconds in profile.longest}
    yield Figure(f"sum of the kernels, {text}", profile.seconds * 1e3, "ms", detail=longest)
    yield Figure(f"kernel with the longest time, {text}", next(iter(longest), "none")[:LONGEST_NAME])


def _run(runner: Runner, rows: StepRows) -> None:
    runner.step(rows)


def _call_seconds(machine: Machine, runner: Runner, rows: StepRows) -> float:
    """Returns the duration of the call of a step while the device is idle. Only an eager runner waits for the step."""
    machine.synchronize()
    start = time.perf_counter()
    runner.step(rows)
    return time.perf_counter() - start


def _device_seconds(machine: Machine, runner: Runner, rows: StepRows) -> float:
    """Returns the mean duration of a step on the device, for many steps that are enqueued one after the other."""
    machine.synchronize()
    count, start, first = 0, time.perf_counter(), machine.event()
    while count < NUM_CALLS or time.perf_counter() - start < STEP_SECONDS:
        runner.step(rows)
        count += 1
    last = machine.event()
    machine.synchronize()
    return first.elapsed_time(last) * 1e-3 / count
