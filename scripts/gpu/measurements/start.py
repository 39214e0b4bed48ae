"""Measures the start of the graph runner: its duration, the captured graphs and their memory."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from app.runner.graphs.device import Graph, GraphDevice
from app.runner.graphs.graph_runner import GraphRunner
from scripts.gpu.measurements.figures import READY, Figure, Options
from scripts.gpu.measurements.machine import Machine, open_gpu

IDLE_SECONDS = 30.0  # time limit for the captures that an idle service makes


class CountingDevice:
    """A device that counts the captured graphs."""

    def __init__(self, device: GraphDevice) -> None:
        self._device, self.num_captures = device, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def capture(self, work: Callable[[], None]) -> Graph:
        """Captures a graph. See GraphDevice.capture."""
        self.num_captures += 1
        return self._device.capture(work)


def measure(options: Options) -> Iterator[Figure]:
    """Yields the figures of a start. Needs a GPU."""
    yield from measure_on(open_gpu(options), IDLE_SECONDS)


def measure_on(machine: Machine, idle_seconds: float, **of_runner: Any) -> Iterator[Figure]:
    """Yields the figures of a start on this machine."""
    device: Any = CountingDevice(machine.graph_device())
    start = time.perf_counter()
    runner = GraphRunner(machine.load(every=True), device, machine.dtype, **of_runner)
    runner.warm_up(lambda: False)
    machine.synchronize()
    yield Figure("loading and warm-up", time.perf_counter() - start, "s")
    if (seconds := process_seconds()) is not None:
        yield Figure("process start to ready, without HTTP", seconds, "s", READY)
    yield Figure("graphs captured when ready", device.num_captures)
    reserved, free = machine.reserved_bytes(), machine.free_bytes()
    yield Figure("reserved memory when ready", reserved / 2**20, "MiB")
    start = time.perf_counter()
    while runner.has_idle_work and time.perf_counter() - start < idle_seconds:
        runner.idle()
    machine.synchronize()
    rest = "" if runner.has_idle_work else " (all)"
    yield Figure(f"graphs captured after idle time{rest}", device.num_captures)
    yield Figure("duration of the captures in idle time", time.perf_counter() - start, "s")
    yield Figure("growth of the reserved memory in idle time", (machine.reserved_bytes() - reserved) / 2**20, "MiB")
    # This includes the memory that the driver needs for graphs, which torch does not count.
    yield Figure("decrease of the free memory in idle time", (free - machine.free_bytes()) / 2**20, "MiB")


def process_seconds() -> float | None:
    """Returns the time since this process started, or None if the system has no /proc."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return None
    return uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK")
