"""Copies tensors between host and device, and waits for the device."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Transfers:
    """Copies tensors to and from a GPU through pinned memory, without waiting. On a CPU, no tensor is copied."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._is_gpu = device, device.type == "cuda"

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

    def wait(self) -> None:
        """Waits until all enqueued work is finished."""
        if self._is_gpu:
            torch.cuda.synchronize(self._device)

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event
