"""Copies between host and device, and the points at which the host waits for the device.

On a GPU the host does not wait for each step. It enqueues up to STEPS_AHEAD steps, so that the GPU has work while the
host selects the rows of the next step.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# The maximum number of steps that are enqueued and unfinished. A new row waits for these steps, so that a larger number
# would delay it. A smaller number would leave the GPU idle between steps.
STEPS_AHEAD = 2


@dataclass(frozen=True, slots=True)
class Shapes:
    """The shape of a network call. On a GPU it is rounded up, because each shape needs its own CUDA graph."""

    exact: bool = True  # False if shapes are rounded up

    def rows(self, count: int) -> int:
        """Returns the number of rows: `count`, or the next power of two if shapes are rounded up."""
        return count if self.exact else 1 << (count - 1).bit_length()

    def evaluations(self, rows: int, further: int) -> int:
        """Returns the number of evaluations of `rows` rows with `further` evaluations in addition to the first ones.

        If shapes are rounded up, the result is `rows` or twice this number, and with more evaluations the next power of
        two. So if one row is guided, all rows count as guided.
        """
        if self.exact or not further:
            return rows + further
        return max(2 * rows, self.rows(rows + further))


class Transfers:
    """Copies tensors to and from a GPU through pinned memory, without waiting. On a CPU it does nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._is_gpu = device, device.type == "cuda"
        self._enqueued: deque[torch.cuda.Event] = deque()

    def upload(self, values: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
        """Returns the values as a tensor (N,) on the device."""
        host = torch.tensor(values, dtype=dtype)
        return host.pin_memory().to(self._device, non_blocking=True) if self._is_gpu else host

    def upload_array(self, array: npt.NDArray[np.generic]) -> Tensor:
        """Returns the array as a tensor of the same shape and dtype on the device."""
        host = torch.from_numpy(array)
        return host.pin_memory().to(self._device, non_blocking=True) if self._is_gpu else host

    def download(self, tensor: Tensor) -> Tensor:
        """Waits until the tensor is computed. Returns it on the host."""
        return self.start_download(tensor)()

    def start_download(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Enqueues a copy to the host. Returns a function that waits for the copy and allocates no memory."""
        if not self._is_gpu:
            return lambda: tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        copied = self._event()

        def wait() -> Tensor:
            copied.synchronize()
            return host

        return wait

    def limit_steps_ahead(self) -> None:
        """Call this after a step is enqueued. Waits until at most STEPS_AHEAD steps are unfinished."""
        if self._is_gpu:
            self._enqueued.append(self._event())
            if len(self._enqueued) > STEPS_AHEAD:
                self._enqueued.popleft().synchronize()

    def wait(self) -> None:
        """Waits until all enqueued work is finished."""
        if self._is_gpu:
            torch.cuda.synchronize(self._device)
            self._enqueued.clear()

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event
