"""Counts how often the host waits for the GPU in the first step of rows, in a further step, and in a reading."""

from collections.abc import Callable, Iterator

from app.engine.job import DEFAULT_MODEL, Trajectory
from app.runner.runner import Runner
from scripts.gpu.measurements.figures import Figure, Options
from scripts.gpu.measurements.machine import Machine, open_gpu
from scripts.gpu.measurements.rows import new_rows, run_step

NUM_ROWS = 16


def measure(options: Options) -> Iterator[Figure]:
    """Yields the number of waits that torch reports. It does not report a wait for an event. Needs a GPU."""
    yield from measure_on(open_gpu(options))


def measure_on(machine: Machine) -> Iterator[Figure]:
    """Yields the figures of a machine. The first rows of a runner are not counted, because they load kernels."""
    for kind in machine.kinds():
        runner = machine.runner(kind)
        for is_counted in (False, True):
            rows = new_rows(runner.models[DEFAULT_MODEL], NUM_ROWS, "mixed")
            works: dict[str, Callable[[Runner, list[Trajectory]], object]] = {
                "first step": run_step,
                "further step": run_step,
                "reading": _read,
            }
            for name, work in works.items():
                with machine.counted_synchronisations() as found:
                    work(runner, rows)
                if is_counted:
                    yield Figure(f"waits, {kind}, {name}", len(found))
            runner.release(rows)
        machine.synchronize()


def _read(runner: Runner, rows: list[Trajectory]) -> None:
    runner.pixels(rows).wait()
