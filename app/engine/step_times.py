"""The step time model: predicts the duration of one reverse step from its number of network evaluations.

Warm-up measures the times of a few batch sizes. The scheduler needs the time of every size at the current
speed of the machine, which may be slower than at warm-up. The model therefore is a curve times a factor:

    step_seconds(n) = slowdown * measured_seconds(n)

`measured_seconds` interpolates between the measured sizes. `slowdown` is one factor for all sizes, because a busy
machine slows down all sizes by about the same factor. It is an exponential moving average: each step that runs moves it
by SMOOTHING times the difference between the slowdown of this step and the average.

A step with CLIP guidance also calls CLIP. All calls of CLIP have the same number of rows (see model/clip_guidance.py)
and therefore the same duration, `clip_seconds`, which warm-up measures too.

Example: the curve is {1: 1.0 ms, 8: 3.6 ms, 16: 7.0 ms}. The predicted time of 12 evaluations is 5.3 ms. If steps take
twice as long from now on, `slowdown` is 1.05 after the first step and 1.95 after 60 steps.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass

from model.clip_guidance import CALL_ROWS

SMOOTHING = 0.05  # weight of the newest step in the moving average
# The largest ratio of the actual to the predicted time that counts. A larger ratio means that the step was interrupted,
# for example because the process was paused. It says little about the next steps.
MAX_JUMP = 4.0


@dataclass(frozen=True, slots=True)
class Throughput:
    """The predicted speed of steps on this machine, as the scheduler uses it."""

    rate: float  # evaluations per second in full steps
    step_seconds: float  # duration of a full step
    lone_seconds: float  # duration of a step with one evaluation


class StepTimes:
    """Predicts step times from the curve that was measured at warm-up and the current slowdown.

    A guided row counts as two evaluations. A step makes one network call for each model. Its time is the sum of the
    times of its calls.
    """

    def __init__(self, seconds_by_rows: Mapping[int, float], clip_seconds: float = 0.0) -> None:
        """`clip_seconds` is the duration of one call of CLIP. It is 0 if no CLIP model is loaded."""
        self._rows = sorted(seconds_by_rows)
        self._seconds = [seconds_by_rows[rows] for rows in self._rows]
        self.clip_seconds = clip_seconds
        self.slowdown = 1.0  # actual time divided by the time at warm-up

    def copy(self) -> "StepTimes":
        """Returns a copy with its own slowdown."""
        return copy(self)

    @property
    def clip_evaluations(self) -> int:
        """Returns the number of evaluations at the best rate that take as long as one row of a full call of CLIP."""
        return math.ceil(self.clip_seconds / CALL_ROWS * self.best_rate)

    @property
    def best_rate(self) -> float:
        """Returns the best measured number of evaluations per second, at the speed of warm-up."""
        return max(rows / seconds for rows, seconds in zip(self._rows, self._seconds, strict=True))

    def observe(self, calls: Sequence[int], seconds: float, clip_calls: int = 0) -> None:
        """Updates the slowdown after a step that took `seconds`.

        `calls` has the number of evaluations of each network call of the step. `clip_calls` is its number of calls of
        CLIP.
        """
        ratio = seconds / (sum(map(self.step_seconds, calls)) + clip_calls * self.slowdown * self.clip_seconds)
        self.slowdown *= 1 + SMOOTHING * (min(ratio, MAX_JUMP) - 1)

    def step_seconds(self, evaluations: float) -> float:
        """Returns the predicted seconds of a step at the current speed of the machine."""
        return self.slowdown * self.measured_seconds(evaluations)

    def measured_seconds(self, evaluations: float) -> float:
        """Returns the seconds of a step at the speed of warm-up.

        Interpolates linearly between the measured batches. Below the smallest measured batch the time is constant.
        Above the largest one it is proportional to the number of evaluations.
        """
        rows, seconds = self._rows, self._seconds
        above = bisect_left(rows, evaluations)  # np.interp() takes longer for one value, and releases the GIL
        if above == 0:
            return seconds[0]
        if above == len(rows):
            return evaluations / rows[-1] * seconds[-1]
        share = (evaluations - rows[above - 1]) / (rows[above] - rows[above - 1])
        return seconds[above - 1] + share * (seconds[above] - seconds[above - 1])

    def best_batch(self, tolerance: float, seconds: float) -> int:
        """Returns the batch size for the best throughput: the number of evaluations of a full step.

        This is the largest measured batch whose rate (evaluations per second) is at least 1 - `tolerance` of the best
        rate and whose time at warm-up is at most `seconds`. `tolerance` is between 0 and 1. If all batches near the
        best rate take longer than `seconds`, returns the smallest of them.

        Example: {8: 1.0 s, 16: 1.6 s, 32: 2.9 s} gives rates of 8, 10 and 11 per second. With a tolerance of 0.2, the
        batches 16 and 32 are near the best rate. A limit of 2 s leaves 16.
        """
        rates = [rows / time for rows, time in zip(self._rows, self._seconds, strict=True)]
        near = [rows for rows, rate in zip(self._rows, rates, strict=True) if rate >= (1 - tolerance) * max(rates)]
        return max((rows for rows in near if self.measured_seconds(rows) <= seconds), default=near[0])

    def largest_batch(self, seconds: float) -> int:
        """Returns the largest number of evaluations that take at most `seconds` at the speed of warm-up.

        The result is not larger than the largest measured batch. It is 0 if one evaluation takes longer.
        """
        fitting = (rows for rows in range(self._rows[-1], 0, -1) if self.measured_seconds(rows) <= seconds)
        return next(fitting, 0)
