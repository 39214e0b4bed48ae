"""The interface to CUDA: graphs, events, and copies between host and device. Tests replace it on a CPU."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

NUM_WARM_UP = 2  # runs before a capture: the libraries create their handles and choose their kernels in the first ones


class Graph(Protocol):
    """Kernels that are enqueued together."""

    def replay(self) -> None:
        """Enqueues the kernels once more, with the same memory addresses."""


class Event(Protocol):
    """The end of the work that was enqueued before the event."""

    def query(self) -> bool:
        """Returns True if the work is done."""

    def synchronize(self) -> None:
        """Waits until the work is done."""


class GraphDevice(Protocol):
    """A device that enqueues work and does it in order."""

    device: torch.device

    def capture(self, work: Callable[[], None]) -> Graph:
        """Returns a graph of the kernels of `work`, which may run a few times before. It must not wait for the device.

        All tensors that `work` creates belong to the graph. Their memory is shared with that of other graphs.
        """

    def host_buffer(self, size: int) -> Tensor:
        """Returns a tensor (size,) int64 on the host that the device can copy from while the host continues."""

    def upload(self, host: Tensor) -> Tensor:
        """Enqueues a copy to the device. The host tensor must not be changed."""

    def download(self, tensor: Tensor) -> tuple[Tensor, Event]:
        """Enqueues a copy to the host. Returns it and the event after which it has the values."""

    def record(self) -> Event:
        """Returns the event at the end of all work that is enqueued now."""

    def synchronize(self) -> None:
        """Waits until all enqueued work is done."""


class CudaDevice:
    """A GPU. All work is enqueued on the current stream of the engine thread."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # captures need a stream of their own

    def capture(self, work: Callable[[], None]) -> Graph:
        """Returns a CUDA graph. The graphs share one memory pool, because they never run at the same time."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(NUM_WARM_UP):
                work()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use CUDA during the capture, for example to read the amount of free memory.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            work()
        return graph

    def host_buffer(self, size: int) -> Tensor:
        """Returns pinned memory."""
        return torch.zeros(size, dtype=torch.int64, pin_memory=True)

    def upload(self, host: Tensor) -> Tensor:
        """Copies through pinned memory. The allocator keeps it until the copy is done."""
        return host.pin_memory().to(self.device, non_blocking=True)

    def download(self, tensor: Tensor) -> tuple[Tensor, Event]:
        """Copies into pinned memory."""
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        return host, self.record()

    def record(self) -> Event:
        """Returns an event on the current stream."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def synchronize(self) -> None:
        """Waits for all streams of the device."""
        torch.cuda.synchronize(self.device)
