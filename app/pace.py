"""How long a step takes, and so how long a backlog does: steps are fixed, which makes the future predictable."""

from bisect import bisect_left
from copy import copy

SMOOTHING = 0.05  # weight of the newest step
MAX_JUMP = 4.0  # a step that takes longer than so many says that the machine stood still, not how slow it is


class Pace:
    """Seconds a step against rows a step: the curve seen while warming up, times how slow the machine is now.

    A guided row counts twice: it is evaluated twice.
    """

    def __init__(self, seconds_by_rows: dict[int, float]) -> None:
        self._rows = sorted(seconds_by_rows)
        self._seconds = [seconds_by_rows[rows] for rows in self._rows]
        self.slowdown = 1.0

    def copy(self) -> "Pace":
        """The same, to observe by itself."""
        return copy(self)

    def observe(self, rows: int, seconds: float, weight: float = SMOOTHING) -> None:
        """A step of `rows` evaluations took `seconds`."""
        self.adjust(seconds / self.step_seconds(rows), weight)

    def adjust(self, ratio: float, weight: float) -> None:
        """A step took `ratio` times as long as was expected."""
        self.slowdown *= 1 + weight * (min(ratio, MAX_JUMP) - 1)

    def relax(self, share: float) -> None:
        """Forgets so much of how slow the machine was."""
        self.slowdown += share * (1 - self.slowdown)

    def step_seconds(self, rows: float) -> float:
        """What a step of that many evaluations takes now."""
        return self.slowdown * self._expected(rows)

    def best_batch(self, tolerance: float) -> int:
        """The smallest measured batch whose rows a second come within `tolerance` (0 to 1) of the best."""
        rates = [rows / seconds for rows, seconds in zip(self._rows, self._seconds, strict=True)]
        return next(rows for rows, rate in zip(self._rows, rates, strict=True) if rate >= (1 - tolerance) * max(rates))

    def largest_batch(self, slowdown: float) -> int:
        """The largest, within what was measured, whose step takes at most so many times as long as that of one row."""
        longest = slowdown * self._expected(1)
        return max(rows for rows in range(1, self._rows[-1] + 1) if self._expected(rows) <= longest)

    def _expected(self, rows: float) -> float:
        """Linear between the measured batches, flat below them, in proportion above."""
        right = bisect_left(self._rows, rows)
        if right == 0:
            return self._seconds[0]
        if right == len(self._rows):
            return self._seconds[-1] * rows / self._rows[-1]
        low, high = self._rows[right - 1 : right + 1]
        share = (rows - low) / (high - low)
        return self._seconds[right - 1] * (1 - share) + self._seconds[right] * share
