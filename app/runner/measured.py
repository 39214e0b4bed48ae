"""A runner that computes nothing, and a count of tensor operations, for measurements of the host cost."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from app.engine.interface import Reading
from app.engine.job import Job, Pixels, StepRows, Trajectory
from app.engine.step_times import StepTimes
from app.runner.graphs.device import Array
from app.runner.graphs.graph_runner import BATCHES, GraphRunner
from model import checkpoint

STEP_SECONDS = 3e-4  # the assumed duration of a step on a GPU
NO_RESULT = torch.zeros(0)
# Operations that launch no kernel on a GPU, in addition to views.
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "resize_", "is_pinned", "_unsafe_view", "lift_fresh"}


class SleepingDevice:
    """A device whose steps take STEP_SECONDS and compute nothing. All other work runs on the CPU."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._busy_until = 0.0

    def enqueue(self, work: Callable[..., None], *arrays: Array) -> None:
        """Runs the work."""
        work(*map(torch.from_numpy, arrays))

    def read(self, work: Callable[..., Tensor], *arrays: Array) -> "Done":
        """Runs the work. Its result is available after the steps that were enqueued before it."""
        return Done(self._busy_until, work(*map(torch.from_numpy, arrays)))

    def capture(self, work: Callable[[], None]) -> "SleepingGraph":
        """Returns a graph that computes nothing. A step takes STEP_SECONDS, and other work takes no time."""
        is_step = getattr(getattr(work, "func", None), "__name__", "") == "_run_step"
        return SleepingGraph(self, STEP_SECONDS if is_step else 0.0)

    def host_buffer(self, size: int) -> Tensor:
        """Returns memory of the host."""
        return torch.zeros(size, dtype=torch.int64)

    def copy(self, buffer: Tensor, to: Tensor) -> None:
        """Copies the buffer to the tensor."""
        to.copy_(buffer)

    def record(self) -> "Done":
        """Returns the end of the enqueued steps."""
        return Done(self._busy_until)

    def synchronize(self) -> None:
        """Waits for the end of the enqueued steps."""
        self.record().synchronize()

    def add(self, seconds: float) -> None:
        """Enqueues work that takes this time."""
        self._busy_until = max(self._busy_until, time.perf_counter()) + seconds


@dataclass(frozen=True, slots=True)
class SleepingGraph:
    """A graph that computes nothing and takes a fixed time."""

    device: SleepingDevice
    seconds: float

    def replay(self) -> None:
        """Enqueues work that takes this time."""
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


class Operations(TorchDispatchMode):
    """Counts the operations that launch a kernel, by the part of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.part = "other"

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Counts the operations within the `with` block as those of `part`."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _launches_kernel(func, args, result):
            self.counts[self.part] += 1
        return result


def _launches_kernel(func: Any, args: Any, result: Any) -> bool:
    """Returns True unless an operation only allocates memory, or returns a view of its argument."""
    if func._schema.name.removeprefix("aten::") in NO_KERNEL:
        return False
    if not isinstance(result, Tensor):
        return not func.is_view
    is_view = func.is_view and result.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr()
    return not is_view and result.numel() > 0


def count_operations(job: Job) -> Counter[str]:
    """Returns the number of tensor operations in the second step of a job's first image, by the part of the step."""
    torch.set_num_threads(1)
    runner = GraphRunner({"default": checkpoint.load(checkpoint.SHIPPED)}, EagerDevice(), torch.bfloat16)
    program, operations = runner._models["default"].program, Operations()
    denoise = program.denoise

    def counted(x_t: Tensor, c: Tensor) -> Tensor:
        with operations.within("network"):
            return denoise(x_t, c)

    program.denoise = counted
    row = job.unfinished[0]
    runner.step(StepRows.of([row]))
    with operations:
        runner.step(StepRows.of([row]))
    return operations.counts
