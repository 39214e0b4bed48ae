"""A runner for measurements of the host cost: its steps compute nothing and take as long as steps on a GPU."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from app.engine.interface import Reading
from app.engine.job import Pixels, StepRows, Trajectory
from app.engine.step_times import StepTimes
from app.runner.graphs.device import Array
from app.runner.graphs.graph_runner import BATCHES, GraphRunner
from model import checkpoint

STEP_SECONDS = 3e-4  # the assumed duration of a step on a GPU
NO_RESULT = torch.zeros(0)


class SleepingDevice:
    """A device whose steps take STEP_SECONDS and compute nothing. All other work runs on the CPU."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._busy_until = 0.0

    def enqueue(self, work: Callable[..., None], *arrays: Array) -> None:
        work(*map(torch.from_numpy, arrays))

    def read(self, work: Callable[..., Tensor], *arrays: Array) -> "Done":
        """Runs the work. Its result is available after the steps that were enqueued before it."""
        return Done(self._busy_until, work(*map(torch.from_numpy, arrays)))

    def capture(self, work: Callable[[], None]) -> "SleepingGraph":
        """Returns a graph that computes nothing. A step takes STEP_SECONDS, and other work takes no time."""
        is_step = getattr(getattr(work, "func", None), "__name__", "") == "_run_step"
        return SleepingGraph(self, STEP_SECONDS if is_step else 0.0)

    def host_buffer(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int64)

    def copy(self, buffer: Tensor, to: Tensor) -> None:
        to.copy_(buffer)

    def record(self) -> "Done":
        """Returns the end of the enqueued steps."""
        return Done(self._busy_until)

    def synchronize(self) -> None:
        """Waits for the end of the enqueued steps."""
        self.record().synchronize()

    def add(self, seconds: float) -> None:
        self._busy_until = max(self._busy_until, time.perf_counter()) + seconds


@dataclass(frozen=True, slots=True)
class SleepingGraph:
    """A graph that computes nothing and takes a fixed time."""

    device: SleepingDevice
    seconds: float

    def replay(self) -> None:
        self.device.add(self.seconds)


@dataclass(frozen=True, slots=True)
class Done:
    """The end of the work that was enqueued before, and its result."""

    at: float
    result: Tensor = NO_RESULT

    def query(self) -> bool:
        """Returns True if the work has ended."""
        return time.perf_counter() >= self.at

    def synchronize(self) -> None:
        """Sleeps until the work has ended. Other threads can run."""
        time.sleep(max(0.0, self.at - time.perf_counter()))

    def is_ready(self) -> bool:
        """Returns True if the work has ended."""
        return self.query()

    def wait(self) -> Tensor:
        """Returns the result when the work has ended."""
        self.synchronize()
        return self.result


class EagerDevice(SleepingDevice):
    """A device that runs the work of a graph on the CPU in each replay."""

    def capture(self, work: Callable[[], None]) -> Any:
        """Returns a graph that runs the work."""
        return EagerGraph(work)


@dataclass(frozen=True, slots=True)
class EagerGraph:
    """A graph that runs its work in each replay."""

    replay: Callable[[], None]


class SleepingRunner(GraphRunner):
    """The runner of a GPU with a SleepingDevice.

    PyTorch uses one thread. Further threads would wait in a busy loop and take CPU time from the measured threads.
    """

    def __init__(self) -> None:
        torch.set_num_threads(1)
        super().__init__({"default": checkpoint.load(checkpoint.SHIPPED)}, SleepingDevice(), torch.bfloat16)
        self.on_step: Callable[[], None] = lambda: None
        self.on_finish: Callable[[Sequence[Trajectory]], None] = lambda rows: None

    def step(self, rows: StepRows, before_call: Callable[[], None] = lambda: None) -> list[Trajectory]:
        """Calls `on_step` and enqueues a step."""
        self.on_step()
        return super().step(rows, before_call)

    def pixels(self, trajectories: list[Trajectory]) -> Reading[Sequence[Pixels | None]]:
        """Calls `on_finish` and reads black images."""
        self.on_finish(trajectories)
        return super().pixels(trajectories)

    def warm_up(self, should_stop: Callable[[], bool]) -> StepTimes:
        """Returns the same duration for every size."""
        return StepTimes(dict.fromkeys(BATCHES, STEP_SECONDS))
