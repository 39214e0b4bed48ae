"""How many compute threads a step has on a CPU: all of them, or one fewer while another process keeps a core.

The threads of a step wait for each other at every operator: where one of them has no core, all stand still. A machine
that is slow as a whole is slow with any number of them: only where this thread had to wait for a core is one a rival's.
A rival of a moment, as the service's own answers are when a batch ends, is none: fewer threads would outlast it.
"""

import time
from collections.abc import Callable, Mapping, Sequence

import torch

from app.engine.step_times import Pace

MARGIN = 1.1  # one fewer must be expected to be so much faster
WEIGHT = 0.2  # of the newest step: a core is taken suddenly
RELAXATION = 1 / 64  # a step: what was seen of one fewer is forgotten while it is not in use
WINDOW_SECONDS = 0.1  # of steps with all threads, after which it is known whether they had their cores
OWN_SHARE = 0.9  # of its steps' time a thread is on a core where nobody else wants it
RIVAL_WINDOWS = 3  # in a row without their cores: somebody stays
SHORTEST_PAUSE = 0.25  # seconds with one fewer until all are tried again, twice as long each time
LONGEST_PAUSE = 4.0


class ComputeThreads:
    """The numbers that may be used, and which of them made the last steps sooner. The bits are the same with each."""

    def __init__(
        self,
        counts: Sequence[int],
        use: Callable[[int], None] = torch.set_num_threads,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`counts` has all of them first, then one fewer where that is an option; `use` acts on the calling thread."""
        self.counts, self._use, self._clock = tuple(counts), use, clock
        self._paces: Mapping[int, Pace] = {}
        self._is_new = False  # no step has been made yet with the present number
        self._windows_of_rival = 0  # the last ones in a row
        self._seconds, self._on_core = 0.0, 0.0  # of the present window
        self._pause, self._set_at = SHORTEST_PAUSE, 0.0
        self.count = self.counts[0]

    def set(self, count: int) -> None:
        """From now on so many."""
        self.count, self._is_new, self._set_at = count, True, self._clock()
        self._use(count)

    def learn(self, paces: Mapping[int, Pace]) -> None:
        """What steps take with each number, measured one after the other."""
        self._paces, self._is_new = paces, False

    def observe(self, calls: Sequence[int], seconds: float, on_core: float) -> None:
        """A step has been made, of so many evaluations in each model's call; the next one's number follows from it.

        It took `seconds`, for `on_core` of which the thread that made it had a core.
        """
        if len(self._paces) < 2:
            return
        every, fewer = self.counts
        weight, self._is_new = (1.0 if self._is_new else WEIGHT), False
        self._paces[self.count].adjust(seconds / self._expected(self.count, calls), weight)
        if self.count == fewer:
            if self._clock() >= self._set_at + self._pause:
                self._pause = min(2 * self._pause, LONGEST_PAUSE)
                self.set(every)
            return
        self._paces[fewer].relax(RELAXATION)
        self._watch(seconds, on_core)
        is_slow = MARGIN * self._expected(fewer, calls) < self._expected(every, calls)
        if is_slow and self._windows_of_rival >= RIVAL_WINDOWS:
            self.set(fewer)

    def _watch(self, seconds: float, on_core: float) -> None:
        self._seconds, self._on_core = self._seconds + seconds, self._on_core + on_core
        if self._seconds < WINDOW_SECONDS:
            return
        if self._on_core < OWN_SHARE * self._seconds:
            self._windows_of_rival += 1
        else:
            self._windows_of_rival, self._pause = 0, SHORTEST_PAUSE
        self._seconds = self._on_core = 0.0

    def _expected(self, count: int, calls: Sequence[int]) -> float:
        return sum(map(self._paces[count].step_seconds, calls))
