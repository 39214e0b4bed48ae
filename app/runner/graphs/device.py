"""The interface to CUDA: graphs, events, and copies between host and device. Tests replace it on a CPU."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakSet

import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]
NUM_WARM_UP = 2  # runs before a capture; in the first ones, the libraries create their handles and choose their kernels


class Graph(Protocol):
    """Recorded kernels, which are enqueued together."""

    def replay(self) -> None:
        """Enqueues the kernels once more, with the same memory addresses."""


class Event(Protocol):
    """The end of all work that was enqueued before this event was made."""

    def query(self) -> bool:
        """Returns True if the work is done."""

    def synchronize(self) -> None:
        """Waits until the work is done."""


class Download(Protocol):
    """A copy from the device to the host."""

    def is_ready(self) -> bool:
        """Returns True if `wait` returns immediately."""

    def wait(self) -> Tensor:
        """Waits for the copy and returns it. Raises the error of the device if there was one."""


class GraphDevice(Protocol):
    """A device that does enqueued work in order, while the host continues.

    Only enqueued work may access tensors on the device. `enqueue` and `read` copy their arrays, so the host may change
    the arrays afterwards. A host buffer must stay unchanged until `copy` is done on the device.
    """

    device: torch.device

    def enqueue(self, work: Callable[..., None], *arrays: Array) -> None:
        """Enqueues work. Its arguments are the arrays as tensors on the device."""

    def read(self, work: Callable[..., Tensor], *arrays: Array) -> "Download":
        """Enqueues work and a copy of its result to the host."""

    def capture(self, work: Callable[[], None]) -> Graph:
        """Returns a graph of the kernels of `work`. Calls `work` several times. `work` must not wait for the device.

        The tensors that `work` creates belong to the graph. They share memory with those of other graphs.
        """

    def host_buffer(self, size: int) -> Tensor:
        """Returns a tensor (size,) int64 on the host, from which the device copies while the host continues."""

    def copy(self, buffer: Tensor, to: Tensor) -> None:
        """Enqueues a copy of a host buffer to a tensor on the device."""

    def record(self) -> Event:
        """Returns the event at the end of the work that is enqueued now."""

    def synchronize(self) -> None:
        """Waits until all enqueued work is done."""


@dataclass(frozen=True, slots=True)
class CudaDownload:
    """A copy in pinned memory."""

    host: Tensor
    copied: Event

    def is_ready(self) -> bool:
        """Returns True if the copy is done."""
        return self.copied.query()

    def wait(self) -> Tensor:
        """Waits for the copy and returns it."""
        self.copied.synchronize()
        return self.host


class CudaDevice:
    """A GPU. All work is enqueued on the current stream of the engine thread."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._graphs: WeakSet[Graph] = WeakSet()  # the graphs in the memory pool `self._pool`
        self._failed: list[Graph] = []  # kept, because torch's allocator still uses a graph whose capture did not end
        self._stream = torch.cuda.Stream(device)  # the default stream cannot be captured

    def enqueue(self, work: Callable[..., None], *arrays: Array) -> None:
        """Calls `work`, which enqueues kernels. The arrays are copied through pinned memory."""
        work(*map(self._upload, arrays))

    def read(self, work: Callable[..., Tensor], *arrays: Array) -> "Download":
        """Calls `work` and copies its result into pinned memory."""
        result = work(*map(self._upload, arrays))
        host = torch.empty_like(result, device="cpu", pin_memory=True)
        host.copy_(result, non_blocking=True)
        return CudaDownload(host, self.record())

    def capture(self, work: Callable[[], None]) -> Graph:
        """Returns a CUDA graph. The graphs share one memory pool, because they never run at the same time."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                for _ in range(NUM_WARM_UP):
                    work()
        finally:  # After an error too, later work on the current stream must not change what these runs read.
            current.wait_stream(self._stream)
        if not self._graphs:  # torch may refuse the handle of a pool whose graphs are all gone.
            self._pool = torch.cuda.graph_pool_handle()
        graph, error = torch.cuda.CUDAGraph(), None
        # Other threads may use CUDA during the capture, for example to read the amount of reserved memory.
        try:
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                try:
                    work()
                except Exception as first:  # If the end of the capture raises too, its error would hide this one.
                    error = first
        except Exception as at_end:
            error = error or at_end
            self._failed.append(graph)
            self._graphs = WeakSet()  # torch refuses further captures in this pool, so the next one gets a new pool.
        finally:
            torch.cuda.set_stream(current)  # if the end of the capture fails, torch does not restore the stream
        try:
            if error:
                raise error
        finally:
            del error  # The error refers to this frame. Without this cycle, its tensors are freed immediately.
        self._graphs.add(graph)
        return graph

    def host_buffer(self, size: int) -> Tensor:
        """Returns pinned memory."""
        return torch.zeros(size, dtype=torch.int64, pin_memory=True)

    def copy(self, buffer: Tensor, to: Tensor) -> None:
        """Enqueues a copy from pinned memory."""
        to.copy_(buffer, non_blocking=True)

    def record(self) -> Event:
        """Returns an event on the current stream."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def synchronize(self) -> None:
        """Waits for all streams of the device."""
        torch.cuda.synchronize(self.device)

    def _upload(self, array: Array) -> Tensor:
        # The allocator keeps the pinned memory until the copy is done.
        return torch.from_numpy(array).pin_memory().to(self.device, non_blocking=True)
