"""How many compute threads a step has on a CPU: all of them, or one fewer while another process keeps a core.

The threads of a step wait for each other at every operator: where one of them has no core, all stand still. A machine
that is slow as a whole is slow with any number of them: only where this thread had to wait for a core is one a rival's.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from app.pace import Pace

MARGIN = 1.1  # the other number must be expected to be so much faster
WEIGHT = 0.2  # of the newest step: a core is taken suddenly
RELAXATION = 1 / 64  # a step: what was seen of the number that is not in use is forgotten, so that it is tried again
WINDOW_SECONDS = 0.1  # of steps with all threads, after which it is known whether they had their cores
OWN_SHARE = 0.9  # of its steps' time a thread is on a core where nobody else wants it


class ComputeThreads:
    """The numbers that may be used, and which of them made the last steps sooner. The bits are the same with each."""

    def __init__(self, counts: Sequence[int], use: Callable[[int], None] = torch.set_num_threads) -> None:
        """`counts` has all of them first, then one fewer where that is an option; `use` acts on the calling thread."""
        self.counts, self._use = tuple(counts), use
        self._paces: Mapping[int, Pace] = {}
        self._is_new = False  # no step has been made yet with the present number
        self._has_rival = False  # somebody else had a core in the last window
        self._seconds, self._on_core = 0.0, 0.0  # of the present window
        self.count = self.counts[0]

    def set(self, count: int) -> None:
        """From now on so many."""
        self.count = count
        self._use(count)

    def learn(self, paces: Mapping[int, Pace]) -> None:
        """What steps take with each number, measured one after the other."""
        self._paces = paces

    def observe(self, calls: Sequence[int], seconds: float, on_core: float) -> None:
        """A step has been made, of so many evaluations in each model's call; the next one's number follows from it.

        It took `seconds`, for `on_core` of which the thread that made it had a core.
        """
        if len(self._paces) < 2:
            return
        is_all = self.count == self.counts[0]
        if is_all:
            self._watch(seconds, on_core)
        (other,) = (count for count in self.counts if count != self.count)
        weight, self._is_new = (1.0 if self._is_new else WEIGHT), False
        self._paces[self.count].adjust(seconds / self._expected(self.count, calls), weight)
        self._paces[other].relax(RELAXATION)
        is_slow = MARGIN * self._expected(other, calls) < self._expected(self.count, calls)
        if is_slow and (self._has_rival or not is_all):
            self.set(other)
            self._is_new = True

    def _watch(self, seconds: float, on_core: float) -> None:
        self._seconds, self._on_core = self._seconds + seconds, self._on_core + on_core
        if self._seconds >= WINDOW_SECONDS:
            self._has_rival = self._on_core < OWN_SHARE * self._seconds
            self._seconds = self._on_core = 0.0

    def _expected(self, count: int, calls: Sequence[int]) -> float:
        return sum(map(self._paces[count].step_seconds, calls))
