"""Runs a training step as a CUDA graph. One launch then starts all kernels of the step.

A graph repeats the recorded kernels with the same memory addresses and the same values from the host. A step that is
recorded must therefore read every value that changes from a tensor that stays at its address, and must not wait for the
device.
"""

import warnings
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

# Steps before the recording. They create the optimizer's state and the handles of the libraries.
NUM_WARM_UP = 3
Step = Callable[[], Tensor]


class Graph(Protocol):
    """Records the kernels of one step and repeats them."""

    def warm_up(self, step: Step) -> Tensor:
        """Runs the step without recording it, on the stream that records later. Returns its result."""

    def capture(self, step: Step) -> Tensor:
        """Records the step without running it. Returns the tensor into which each replay writes its result."""

    def replay(self) -> None:
        """Runs the recorded kernels once. Does not wait for them."""


MakeGraph = Callable[[torch.Generator], Graph]


class CudaGraph:
    """A graph on the generator's device. Each replay draws new random numbers from the generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # Without this, each replay would use the random numbers of the recording.
        self._graph.register_generator_state(generator)
        self._device = generator.device
        self._stream = torch.cuda.Stream(self._device)

    def warm_up(self, step: Step) -> Tensor:
        """Runs the step on the graph's stream. Returns its result."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), warnings.catch_warnings():
            # The optimizer warns when a step that can be recorded is run without a recording.
            warnings.filterwarnings("ignore", message=".*capturable=True")
            result = step()
        current.wait_stream(self._stream)
        return result

    def capture(self, step: Step) -> Tensor:
        """Records the step. Returns the tensor into which each replay writes its result."""
        with torch.cuda.device(self._device), torch.cuda.graph(self._graph, stream=self._stream):
            return step()

    def replay(self) -> None:
        """Starts the recorded kernels on the current stream."""
        self._graph.replay()


class GraphedStep:
    """Calls a step: the first NUM_WARM_UP times directly, then as a graph. Each call has the effect of one step.

    The result of a call is valid until the next call.
    """

    def __init__(self, step: Step, graph: Graph) -> None:
        self._step, self._graph = step, graph
        self._num_calls = 0
        self._result: Tensor | None = None  # None before the recording

    def __call__(self) -> Tensor:
        self._num_calls += 1
        if self._num_calls <= NUM_WARM_UP:
            return self._graph.warm_up(self._step)
        if self._result is None:
            self._result = self._graph.capture(self._step)
        self._graph.replay()
        return self._result
