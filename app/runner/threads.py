"""Chooses the number of compute threads on a CPU. One thread fewer is used while another process uses a core.

Reason: the compute threads of a step wait for each other after every operator. If one of them has no core, all of them
wait. This effect was measured on a Xeon with AMX (two cores, 64 rows per step) while another process used one core: two
threads ran 12 steps per second, and one thread ran 22.

Detection: the share of the steps' duration in which the engine thread has a core is measured. It is 99% on an idle
machine and 62 to 69% while another process competes for the cores. A machine that is slow for another reason, such as
a lower clock rate, does not change this share.

Rule: the share is computed for windows of 0.1 s of steps. After three windows in a row with a share below 75%, one
thread fewer is used for a pause of 0.25 s. Then all threads are tried again. If the next window is below 75% too, the
next pause is twice as long, up to 4 s. A window with a higher share resets the pause to 0.25 s.

Example: a backup uses one core for 10 minutes. One thread fewer is used after about 0.3 s of steps. Soon the pauses
last 4 s, with one window of all threads between them. After the backup, all threads are used again within about 4 s.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

WINDOW_SECONDS = 0.1  # duration of the steps over which the share is computed
OWN_SHARE = 0.75  # a lower share means that another process competes for the core
# Number of consecutive windows with a low share after which one thread fewer is used. Encoding and sending the answers
# of a large batch also lowers the share, but for a shorter time than this.
BUSY_WINDOWS = 3
SHORTEST_PAUSE, LONGEST_PAUSE = 0.25, 4.0  # duration in seconds of a pause, which uses one thread fewer


class ComputeThreads:
    """Chooses the number of compute threads for each step. The results are bitwise equal for all numbers."""

    def __init__(
        self,
        counts: Sequence[int],
        use: Callable[[int], None] = torch.set_num_threads,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`counts` are the permitted numbers: (all,) or (all, all - 1). `use` sets the number in the calling thread."""
        self.counts, self._use, self._clock = tuple(counts), use, clock
        self._busy_windows = 0  # consecutive windows with a low share, up to the last window
        self._seconds, self._on_core = 0.0, 0.0  # sums over the steps of the current window
        self._pause, self._set_at = SHORTEST_PAUSE, 0.0
        self._is_fixed = False
        self.count = self.counts[0]

    def set(self, count: int) -> None:
        """Sets the number of threads and starts a new window."""
        self.count, self._set_at = count, self._clock()
        self._seconds = self._on_core = 0.0
        self._use(count)

    @contextmanager
    def fixed(self, count: int) -> Iterator[None]:
        """Uses this number of threads within the `with` block. Uses all threads after the block."""
        self._is_fixed = True
        self.set(count)
        try:
            yield
        finally:
            self._is_fixed = False
            self.set(self.counts[0])

    @contextmanager
    def exactly(self, count: int | None) -> Iterator[None]:
        """Uses this number of threads within the `with` block, and the present one after it. None changes nothing."""
        if count in (None, self.count):
            yield
            return
        self._use(count)
        try:
            yield
        finally:
            self._use(self.count)

    def observe(self, seconds: float, on_core: float) -> None:
        """Chooses the number of threads for the next step, after a step that took `seconds`.

        `on_core` is the part of `seconds` in which the engine thread had a core.
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
