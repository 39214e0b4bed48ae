"""How many compute threads a step has on a CPU: all of them, or one fewer while another process keeps a core.

The threads of a step wait for each other at every operator: where one of them has no core, all stand still.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from app.pace import Pace

RETRY_STEPS = 64  # with one fewer, until a single step is made with all again
MARGIN = 1.1  # fewer must be so much faster
WEIGHT = 0.2  # of the newest step: a core is taken suddenly


class ComputeThreads:
    """The numbers that may be used, and which of them made the last steps sooner. The bits are the same with each."""

    def __init__(self, counts: Sequence[int], use: Callable[[int], None] = torch.set_num_threads) -> None:
        """`counts` has all of them first, then one fewer where that is an option; `use` acts on the calling thread."""
        self.counts, self._use = tuple(counts), use
        self._paces: Mapping[int, Pace] = {}
        self._steps_left = 0  # with one fewer
        self._retrying = False
        self.count = self.counts[0]

    def set(self, count: int) -> None:
        """From now on so many."""
        self.count = count
        self._use(count)

    def learn(self, paces: Mapping[int, Pace]) -> None:
        """What steps take with each number, measured one after the other."""
        self._paces = paces

    def observe(self, evaluations: int, seconds: float) -> None:
        """A step has been made; the next one's number follows from it."""
        if len(self._paces) < 2:
            return
        most, fewer = self.counts
        weight, self._retrying = (1.0 if self._retrying else WEIGHT), False
        self._paces[self.count].observe(evaluations, seconds, weight)
        if self.count == most:
            with_most, with_fewer = (self._paces[count].step_seconds(evaluations) for count in self.counts)
            if MARGIN * with_fewer < with_most:
                self.set(fewer)
                self._steps_left = RETRY_STEPS
        else:
            self._steps_left -= 1
            if not self._steps_left:
                self.set(most)
                self._retrying = True
