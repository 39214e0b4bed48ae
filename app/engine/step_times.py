"""Step times: how long one reverse step takes, given its number of network evaluations."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np

SMOOTHING = 0.05  # weight of the newest step
MAX_JUMP = 4.0  # a step that is slower was interrupted; it counts as this many times slower


@dataclass(frozen=True, slots=True)
class Throughput:
    """The throughput of full steps: evaluations a second, seconds of a full step and of a step of one evaluation."""

    rate: float
    step_seconds: float
    lone_seconds: float


class StepTimes:
    """The seconds of a step by its evaluations: the curve measured at warm-up, times the present slowdown.

    A guided row counts as two evaluations. Each model in a step has its own call.
    """

    def __init__(self, seconds_by_rows: dict[int, float]) -> None:
        self._rows = sorted(seconds_by_rows)
        self._seconds = [seconds_by_rows[rows] for rows in self._rows]
        self._curve = np.array(self._rows), np.array(self._seconds)  # numpy would convert lists at each call
        self.slowdown = 1.0

    def copy(self) -> "StepTimes":
        """Returns an independent copy."""
        return copy(self)

    def observe(self, calls: Sequence[int], seconds: float) -> None:
        """Updates the slowdown after a step that took `seconds`. `calls` are the evaluations of each model's call."""
        ratio = seconds / sum(map(self.step_seconds, calls))
        self.slowdown *= 1 + SMOOTHING * (min(ratio, MAX_JUMP) - 1)

    def step_seconds(self, evaluations: float) -> float:
        """Returns the seconds of a step at the machine's present speed."""
        return self.slowdown * self.measured_seconds(evaluations)

    def measured_seconds(self, evaluations: float) -> float:
        """Returns the seconds of a step as measured at warm-up.

        Interpolates linearly. Below the smallest measured batch the time is constant, above the largest proportional.
        """
        above = max(1.0, evaluations / self._rows[-1])
        return above * float(np.interp(evaluations, *self._curve))

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
