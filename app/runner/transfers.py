"""Copies between host and device, and decides when the host waits for the device."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STEPS_AHEAD = 2  # enqueued and not done: enough to keep a GPU busy, few enough that a new row starts soon


@dataclass(frozen=True, slots=True)
class Shapes:
    """The number of rows of a network call. On a GPU it is rounded up, since each number needs its own CUDA graph."""

    exact: bool = True

    def rows(self, count: int) -> int:
        """Returns `count` if shapes are exact, else the next power of two."""
        return count if self.exact else 1 << (count - 1).bit_length()

    def evaluations(self, rows: int, guided: int) -> int:
        """Returns the evaluations of `rows` rows. If shapes are rounded, all rows count as guided if one is."""
        return rows + guided if self.exact else rows * (2 if guided else 1)


class Transfers:
    """Copies tensors through pinned memory on a GPU, without waiting. On a CPU nothing is copied or waited for."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._is_gpu = device, device.type == "cuda"
        self._enqueued: deque[torch.cuda.Event] = deque()

    def upload(self, values: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
        """Returns the values (N,) on the device."""
        host = torch.tensor(values, dtype=dtype)
        return host.pin_memory().to(self._device, non_blocking=True) if self._is_gpu else host

    def download(self, tensor: Tensor) -> Tensor:
        """Waits until the tensor is computed and returns it on the host."""
        return self.start_download(tensor)()

    def start_download(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Enqueues a copy to the host. Returns a function that waits for it and allocates no memory."""
        if not self._is_gpu:
            return lambda: tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        copied = self._event()

        def wait() -> Tensor:
            copied.synchronize()
            return host

        return wait

    def note_step(self) -> None:
        """Call this after a step was enqueued. Waits until at most STEPS_AHEAD steps are not done."""
        if self._is_gpu:
            self._enqueued.append(self._event())
            if len(self._enqueued) > STEPS_AHEAD:
                self._enqueued.popleft().synchronize()

    def wait(self) -> None:
        """Waits until all enqueued work is done."""
        if self._is_gpu:
            torch.cuda.synchronize(self._device)
            self._enqueued.clear()

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event
