"""Calls of CUDA graphs: integers are copied to the device, then a graph that reads them is replayed.

The copies use a ring of host buffers. A buffer is used again when the device has done the call for which it was filled.
So the ring also limits the number of calls that are enqueued and not done.
"""

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from app.runner.graphs.device import Array, Event, Graph, GraphDevice

# The largest number of calls that are enqueued and not done. A new row waits for these calls, so a larger number would
# delay it. With a smaller number, the GPU would be idle between steps.
CALLS_AHEAD = 2


@dataclass(slots=True)
class _Buffer:
    """A host buffer, and the end of the call for which it was filled."""

    tensor: Tensor  # (size,) int64
    array: Array  # the same memory as a NumPy array
    done: Event | None = None


class GraphCalls:
    """The graphs of one kind of work. All of them read their inputs from the same tensor on the device."""

    def __init__(self, device: GraphDevice, size: int) -> None:
        """`size` is the largest number of integers of a call."""
        self._device = device
        self.inputs = torch.zeros(size, dtype=torch.int64, device=device.device)
        tensors = [device.host_buffer(size) for _ in range(CALLS_AHEAD)]
        self._ring = deque(_Buffer(tensor, tensor.numpy()) for tensor in tensors)
        self._graphs: dict[Hashable, Graph] = {}

    def __contains__(self, key: Hashable) -> bool:
        """Returns True if the graph is captured."""
        return key in self._graphs

    def __iter__(self):  # type: ignore[no-untyped-def]
        """Iterates over the keys of the captured graphs."""
        return iter(self._graphs)

    def capture(self, key: Hashable, work: Callable[[], None]) -> None:
        """Captures the graph of `work`. While it is captured, all inputs are 0."""
        self._device.enqueue(lambda: _clear(self.inputs))
        self._graphs[key] = self._device.capture(work)

    def clear(self) -> None:
        """Removes all graphs. Waits until the device has done them."""
        self._device.synchronize()
        self._graphs.clear()

    def call(self, key: Hashable, *parts: Array) -> None:
        """Copies the parts to the inputs, one after the other, and replays the graph. Waits if the ring is full."""
        graph, buffer = self._graphs[key], self._ring[0]
        if buffer.done:
            buffer.done.synchronize()
        size = sum(map(len, parts))
        np.concatenate(parts, out=buffer.array[:size])
        self._device.copy(buffer.tensor[:size], self.inputs[:size])
        graph.replay()
        buffer.done = self._device.record()
        self._ring.rotate(-1)


def _clear(inputs: Tensor) -> None:
    inputs.zero_()
