"""What goes between host and device, and when the host waits for the device."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STEPS_AHEAD = 2  # enqueued and not done: enough to keep a GPU busy, few enough for a newcomer to be in soon


@dataclass(frozen=True, slots=True)
class Shapes:
    """How many rows a call of the network has. On a GPU a graph is recorded for each number: they are rounded up."""

    exact: bool = True

    def rows(self, count: int) -> int:
        """For so many rows: themselves, or the next power of two."""
        return count if self.exact else 1 << (count - 1).bit_length()

    def evaluations(self, rows: int, guided: int) -> int:
        """For so many rows, some of which are guided; rounded, none or all of them."""
        return rows + guided if self.exact else rows * (2 if guided else 1)


class Transfers:
    """On a GPU through pinned memory and without a wait; on a CPU nothing is to be moved, and all is done at once."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._is_gpu = device, device.type == "cuda"
        self._enqueued: deque[torch.cuda.Event] = deque()

    def upload(self, values: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
        """(N,) on the device."""
        host = torch.tensor(values, dtype=dtype)
        return host.pin_memory().to(self._device, non_blocking=True) if self._is_gpu else host

    def download(self, tensor: Tensor) -> Tensor:
        """Returns the tensor on the host, as soon as it is computed."""
        return self.start_download(tensor)()

    def start_download(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Enqueues a copy to the host and returns a function that waits for it. Only this call takes memory."""
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
        """A step was enqueued: waits until no more than STEPS_AHEAD are to be done."""
        if self._is_gpu:
            self._enqueued.append(self._event())
            if len(self._enqueued) > STEPS_AHEAD:
                self._enqueued.popleft().synchronize()

    def wait(self) -> None:
        """Until all that was enqueued is done."""
        if self._is_gpu:
            torch.cuda.synchronize(self._device)
            self._enqueued.clear()

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event
