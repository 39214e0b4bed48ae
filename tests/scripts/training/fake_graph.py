"""A graph that records the operations of a step on a CPU, and fails where a CUDA graph would give wrong results."""

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from scripts.training.graphs import Step
from tests.tape import Tape, spoil


class FakeGraph:
    """Repeats the recorded operations with the recorded tensors and numbers, as a CUDA graph repeats kernels.

    No Python code of the step runs in a replay. After each replay all `inputs` are overwritten, and before each replay
    all tensors that the recording created. A replay that reads an input that was not set again, or a result of an
    earlier replay, therefore gets NaN or a row number that does not exist.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.inputs: list[Tensor] = []
        self.num_warm_ups = self.num_captures = self.num_replays = 0
        self._generator = generator
        self._tape = Tape()

    def warm_up(self, step: Step) -> Tensor:
        self.num_warm_ups += 1
        return step()

    def capture(self, step: Step) -> Tensor:
        """Records the step. Then restores all tensors and the generator, because a recording runs nothing."""
        self.num_captures += 1
        before = self._generator.get_state()
        with self._tape:
            result = step()
        self._tape.restore()
        self._generator.set_state(before)
        return result

    def replay(self) -> None:
        self.num_replays += 1
        for tensor in self._tape.created:
            spoil(tensor)
        self._tape.replay()
        for tensor in self.inputs:
            spoil(tensor)

    @property
    def calls(self) -> list[tuple[OpOverload, tuple[Any, ...]]]:
        """The recorded operations and their positional arguments."""
        return [call[:2] for call in self._tape.calls]
