"""A device on a CPU that does its work late, and whose graphs fail where a CUDA graph would give wrong results."""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from app.runner.graphs.device import Array
from tests.tape import Tape, spoil


class LateDevice:
    """Queues all work, and does it in order: at random times, and when the host waits.

    Work that is done late reads the host buffers late. A buffer that was filled again too early gives wrong results.
    Graphs repeat the recorded operations without Python code. Their inputs and all tensors that they created have NaN
    or impossible row numbers before they are set again.
    """

    def __init__(self, seed: int = 0, most_queued: int = 40) -> None:
        self.device = torch.device("cpu")
        self.num_waits = self.num_captures = self.num_replays = 0
        self._choose, self._most_queued = random.Random(seed), most_queued
        self._queue: deque[Callable[[], None]] = deque()
        self._num_queued = self._num_done = 0
        self._inputs: list[Tensor] = []  # the tensors that host buffers were copied to

    def enqueue(self, work: Callable[..., None], *arrays: Array) -> None:
        tensors = [torch.from_numpy(array.copy()) for array in arrays]
        self._add(lambda: work(*tensors))

    def read(self, work: Callable[..., Tensor], *arrays: Array) -> "LateDownload":
        download, tensors = LateDownload(self), [torch.from_numpy(array.copy()) for array in arrays]
        self._add(lambda: download.results.append(work(*tensors).clone()))
        download.at = self._num_queued
        return download

    def capture(self, work: Callable[[], None]) -> "LateGraph":
        """Records the work and undoes its effects. Everything that was queued before is done first."""
        self.do_until(self._num_queued)
        self.num_captures += 1
        tape = Tape()
        with torch.inference_mode(), tape:
            work()
        tape.restore()
        return LateGraph(self, tape)

    def host_buffer(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int64)

    def copy(self, buffer: Tensor, to: Tensor) -> None:
        if all(to.data_ptr() != known.data_ptr() for known in self._inputs):
            self._inputs.append(to)
        self._add(partial(_copy, buffer, to))

    def record(self) -> "LateEvent":
        return LateEvent(self, self._num_queued)

    def synchronize(self) -> None:
        self.num_waits += bool(self._queue)
        self.do_until(self._num_queued)

    def is_done(self, number: int) -> bool:
        return self._num_done >= number

    def do_until(self, number: int) -> None:
        with torch.inference_mode():
            while self._num_done < number:
                self._queue.popleft()()
                self._num_done += 1

    def replay(self, tape: Tape) -> None:
        self.num_replays += 1
        self._add(lambda: self._replay(tape))

    def _replay(self, tape: Tape) -> None:
        for tensor in tape.created:
            spoil(tensor)
        tape.replay()
        for tensor in self._inputs:
            spoil(tensor)

    def _add(self, work: Callable[[], None]) -> None:
        self._queue.append(work)
        self._num_queued += 1
        if self._choose.random() < 0.3:
            self.do_until(self._num_queued - min(len(self._queue), self._choose.randrange(self._most_queued)))


def _copy(buffer: Tensor, to: Tensor) -> None:
    to.copy_(buffer)


@dataclass(frozen=True)
class LateGraph:
    device: LateDevice
    tape: Tape

    def replay(self) -> None:
        self.device.replay(self.tape)


@dataclass(frozen=True)
class LateEvent:
    device: LateDevice
    at: int

    def query(self) -> bool:
        return self.device.is_done(self.at)

    def synchronize(self) -> None:
        self.device.num_waits += not self.query()
        self.device.do_until(self.at)


@dataclass
class LateDownload:
    device: LateDevice
    results: list[Tensor] = field(default_factory=list)
    at: int = 0

    def is_ready(self) -> bool:
        return bool(self.results)

    def wait(self) -> Tensor:
        self.device.num_waits += not self.results
        self.device.do_until(self.at)
        return self.results[0]
