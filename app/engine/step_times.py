"""Step times: how long one reverse step takes, given its number of network evaluations."""

from bisect import bisect_left
from collections.abc import Sequence
from copy import copy

SMOOTHING = 0.05  # weight of the newest step
MAX_JUMP = 4.0  # a step that takes even longer was interrupted: it counts as this many times slower


class Pace:
    """Seconds of a step against its evaluations: the curve measured while warming up, times the present slowdown.

    A guided row counts as two evaluations. Each model that takes part in a step makes a call of its own.
    """

    def __init__(self, seconds_by_rows: dict[int, float]) -> None:
        self._rows = sorted(seconds_by_rows)
        self._seconds = [seconds_by_rows[rows] for rows in self._rows]
        self.slowdown = 1.0

    def copy(self) -> "Pace":
        """Returns an independent copy."""
        return copy(self)

    def observe(self, calls: Sequence[int], seconds: float, weight: float = SMOOTHING) -> None:
        """Learns from a step that took `seconds`; `calls` are the evaluations of each model's call."""
        self.adjust(seconds / sum(map(self.step_seconds, calls)), weight)

    def adjust(self, ratio: float, weight: float) -> None:
        """Learns from a step that took `ratio` times as long as expected."""
        self.slowdown *= 1 + weight * (min(ratio, MAX_JUMP) - 1)

    def relax(self, share: float) -> None:
        """Moves the slowdown towards 1 by `share` of the distance."""
        self.slowdown += share * (1 - self.slowdown)

    def step_seconds(self, evaluations: float) -> float:
        """Returns the seconds of a step at the machine's present speed."""
        return self.slowdown * self.measured_seconds(evaluations)

    def measured_seconds(self, evaluations: float) -> float:
        """Returns the seconds of a step as measured while warming up.

        Interpolates linearly. Below the smallest measured batch the time is constant, above the largest proportional.
        """
        right = bisect_left(self._rows, evaluations)
        if right == 0:
            return self._seconds[0]
        if right == len(self._rows):
            return self._seconds[-1] * evaluations / self._rows[-1]
        low, high = self._rows[right - 1 : right + 1]
        share = (evaluations - low) / (high - low)
        return self._seconds[right - 1] * (1 - share) + self._seconds[right] * share

    def best_batch(self, tolerance: float, seconds: float) -> int:
        """Returns the largest measured batch that takes at most `seconds` and is within `tolerance` of the best rate.

        `tolerance` is a share, 0 to 1. If all batches near the best rate take longer, returns the smallest of them.
        """
        rates = [rows / time for rows, time in zip(self._rows, self._seconds, strict=True)]
        near = [rows for rows, rate in zip(self._rows, rates, strict=True) if rate >= (1 - tolerance) * max(rates)]
        return max((rows for rows in near if self.measured_seconds(rows) <= seconds), default=near[0])

    def largest_batch(self, seconds: float) -> int:
        """Returns the largest batch, up to the largest measured one, whose measured time is within `seconds`.

        Returns 0 if even one evaluation takes longer.
        """
        fitting = (rows for rows in range(self._rows[-1], 0, -1) if self.measured_seconds(rows) <= seconds)
        return next(fitting, 0)
