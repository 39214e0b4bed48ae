"""A runner without a device, and a count of tensor operations. Both serve measurements of the host cost."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from app.engine.batch import StepRows
from app.engine.interface import Reading, Ready
from app.engine.job import Job, Pixels, Trajectory
from app.engine.step_times import StepTimes
from app.runner.device_state import rows_of
from app.runner.runner import BATCHES_AHEAD, Runner
from model import checkpoint

STEP_SECONDS = 3e-4  # the assumed duration of a step on a GPU
# Operations that launch no kernel on a GPU, in addition to views.
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "resize_", "is_pinned", "_unsafe_view", "lift_fresh"}


class SleepingRunner(Runner):
    """Does the host's part of each step. Instead of the device's part it sleeps for STEP_SECONDS."""

    def __init__(self) -> None:
        super().__init__(
            {"default": checkpoint.load(checkpoint.SHIPPED)}, torch.device("cpu"), torch.bfloat16, runs_ahead=True
        )
        self.on_step: Callable[[], None] = lambda: None
        self.on_finish: Callable[[Sequence[Trajectory]], None] = lambda rows: None
        self._image: Pixels = np.zeros(self.image_shape[1:], dtype=np.uint8)

    def step(self, rows: StepRows, before_call: Callable[[], None] = lambda: None) -> list[Trajectory]:
        """Assigns slots, makes the row indices, and sleeps."""
        self.on_step()
        trajectories = rows.trajectories
        for trajectory in trajectories:
            if not trajectory.slots:
                trajectory.slots = (self._slots._free.pop(),)
        rows_of(trajectories, 10, self._shapes, self._transfers)
        before_call()
        time.sleep(STEP_SECONDS)
        return []

    def pixels(self, trajectories: list[Trajectory]) -> Reading[Sequence[Pixels | None]]:
        """Returns black images."""
        self.on_finish(trajectories)
        return Ready([self._image] * len(trajectories))

    def warm_up(self, should_stop: Callable[[], bool]) -> StepTimes:
        """Returns the same duration for every size."""
        return StepTimes(dict.fromkeys(BATCHES_AHEAD, STEP_SECONDS))


class Operations(TorchDispatchMode):
    """Counts the operations that launch a kernel, by the part of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.part = "other"

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func._schema.name.removeprefix("aten::") not in NO_KERNEL:
            self.counts[self.part] += 1
        return func(*args, **(kwargs or {}))


def count_operations(job: Job) -> Counter[str]:
    """Returns the number of tensor operations of a step of a job's first image, for the network and for the rest."""
    torch.set_num_threads(1)
    runner = Runner(
        {"default": checkpoint.load(checkpoint.SHIPPED)}, torch.device("cpu"), torch.bfloat16, runs_ahead=True
    )
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
