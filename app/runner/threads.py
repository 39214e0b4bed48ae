"""Chooses the number of compute threads on a CPU: all of them, or one fewer while another process uses a core.

The threads of a step wait for each other at every operator, so that one thread without a core delays all of them.
While another process uses one of two cores, two threads make 12 steps a second and one makes 22 (64 rows, Xeon with
AMX). The thread that runs the steps has its core for 99 % of their time on an idle machine, and for 62 to 69 % of it
while another process wants the core. This share does not change if the whole machine is slow.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

WINDOW_SECONDS = 0.1  # of steps with all threads; the share is computed over this time
OWN_SHARE = 0.75  # a lower share means that another process wants the core
BUSY_WINDOWS = 3  # in a row before one thread fewer is used; sending the answers of a large batch takes less time
SHORTEST_PAUSE, LONGEST_PAUSE = 0.25, 4.0  # seconds with one fewer until all are tried again; doubles each time


class ComputeThreads:
    """Chooses between the permitted numbers of threads. The results have the same bits with each number."""

    def __init__(
        self,
        counts: Sequence[int],
        use: Callable[[int], None] = torch.set_num_threads,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`counts` has all threads first, then one fewer if permitted. `use` sets the number for the calling thread."""
        self.counts, self._use, self._clock = tuple(counts), use, clock
        self._busy_windows = 0  # consecutive, up to the last one
        self._seconds, self._on_core = 0.0, 0.0  # of the present window
        self._pause, self._set_at = SHORTEST_PAUSE, 0.0
        self._is_fixed = False
        self.count = self.counts[0]

    def set(self, count: int) -> None:
        """Sets the number of threads."""
        self.count, self._set_at = count, self._clock()
        self._seconds = self._on_core = 0.0
        self._use(count)

    @contextmanager
    def fixed(self, count: int) -> Iterator[None]:
        """Uses this number within the block, whatever is observed. Uses all threads after the block."""
        self._is_fixed = True
        self.set(count)
        try:
            yield
        finally:
            self._is_fixed = False
            self.set(self.counts[0])

    def observe(self, seconds: float, on_core: float) -> None:
        """Chooses the number for the next step after a step that took `seconds`.

        `on_core` is the part of these seconds in which the calling thread had a core.
        """
        if self._is_fixed or len(self.counts) < 2:
            return
        if self.count != self.counts[0]:
            if self._clock() >= self._set_at + self._pause:
                self._pause = min(2 * self._pause, LONGEST_PAUSE)
                self.set(self.counts[0])
            return
        self._seconds, self._on_core = self._seconds + seconds, self._on_core + on_core
        if self._seconds < WINDOW_SECONDS:
            return
        if self._on_core >= OWN_SHARE * self._seconds:
            self._busy_windows, self._pause = 0, SHORTEST_PAUSE
        else:
            self._busy_windows += 1
        self._seconds = self._on_core = 0.0
        if self._busy_windows >= BUSY_WINDOWS:
            self.set(self.counts[-1])
