"""The step time model: predicts the duration of one reverse step from its number of network evaluations.

Warm-up measures the times of a few batch sizes, for each architecture that is served. The scheduler needs the time of
every size at the current speed of the machine, which may be slower than at warm-up. The model therefore is a curve for
each served model, times a factor:

    step_seconds(n) = slowdown * curve.seconds(n)

The curve interpolates between the measured sizes. `slowdown` is one factor for all sizes and models, because a busy
machine slows down all of them by about the same factor. It is the inverse of the mean speed of the last steps. The
weight of the past falls to 1 / e in MEMORY_SECONDS of steps, so that the prediction follows a change within a second,
whatever the duration of a step is.

A step with CLIP guidance also calls CLIP. All calls of CLIP have the same number of rows (see model/clip_guidance.py)
and therefore the same duration, `clip_seconds`, which warm-up measures too.

Example: the curve is {1: 1.0 ms, 8: 3.6 ms, 16: 7.0 ms}. The predicted time of 12 evaluations is 5.3 ms. If steps take
ten times as long from now on, `slowdown` is about 2.3 after 0.2 s and 9.4 after 1 s.
"""

import math
from bisect import bisect_left
from collections.abc import Collection, Mapping
from copy import copy
from dataclasses import dataclass

from model.spec import CALL_ROWS

MEMORY_SECONDS = 0.2
# The largest ratio of the actual to the predicted time that counts. A larger ratio means that the step was interrupted,
# for example because the process was paused. It says little about the next steps.
MAX_JUMP = 10.0


@dataclass(frozen=True, slots=True)
class Throughput:
    """The predicted speed of steps on this machine, as the scheduler uses it."""

    rate: float  # evaluations per second in full steps
    step_seconds: float  # duration of a full step
    lone_seconds: float  # duration of a step with one evaluation
    reserve_seconds: float = 0.0  # the largest time that the reserve can take from the other jobs (see reserve.py)


class Curve:
    """The seconds of a step of one model by its number of evaluations, at the speed of warm-up."""

    def __init__(self, seconds_by_rows: Mapping[int, float]) -> None:
        self._rows = sorted(seconds_by_rows)
        self._seconds = [seconds_by_rows[rows] for rows in self._rows]

    @property
    def rows(self) -> list[int]:
        """Returns the measured numbers of evaluations, in order."""
        return self._rows

    @property
    def best_rate(self) -> float:
        """Returns the best measured number of evaluations per second."""
        return max(rows / seconds for rows, seconds in zip(self._rows, self._seconds, strict=True))

    def seconds(self, evaluations: float) -> float:
        """Returns the seconds of a step.

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
        rate and whose time is at most `seconds`. `tolerance` is between 0 and 1. If all batches near the best rate take
        longer than `seconds`, returns the smallest of them.

        Example: {8: 1.0 s, 16: 1.6 s, 32: 2.9 s} gives rates of 8, 10 and 11 per second. With a tolerance of 0.2, the
        batches 16 and 32 are near the best rate. A limit of 2 s leaves 16.
        """
        rates = [rows / time for rows, time in zip(self._rows, self._seconds, strict=True)]
        near = [rows for rows, rate in zip(self._rows, rates, strict=True) if rate >= (1 - tolerance) * max(rates)]
        return max((rows for rows in near if self.seconds(rows) <= seconds), default=near[0])

    def largest_batch(self, seconds: float) -> int:
        """Returns the largest number of evaluations that take at most `seconds`.

        The result is not larger than the largest measured batch. It is 0 if one evaluation takes longer.
        """
        fitting = (rows for rows in range(self._rows[-1], 0, -1) if self.seconds(rows) <= seconds)
        return next(fitting, 0)


class StepTimes:
    """Predicts step times from the curves that were measured at warm-up and the current slowdown.

    A guided row counts as two evaluations. A step makes one network call for each model. Its time is the sum of the
    times of its calls.
    """

    def __init__(
        self,
        seconds_by_rows: Mapping[int, float],
        clip_seconds: float = 0.0,
        of_models: Mapping[str, Mapping[int, float]] | None = None,
    ) -> None:
        """`of_models` has the times of the models whose times differ from `seconds_by_rows`.

        `clip_seconds` is the duration of one call of CLIP. It is 0 if no CLIP model is loaded.
        """
        self._curve = Curve(seconds_by_rows)
        self._of_models = {model: Curve(seconds) for model, seconds in (of_models or {}).items()}
        self.clip_seconds = clip_seconds
        self.slowdown = 1.0  # actual time divided by the time at warm-up

    def copy(self) -> "StepTimes":
        """Returns a copy with its own slowdown."""
        return copy(self)

    def of(self, model: str) -> Curve:
        """Returns the curve of a model."""
        return self._of_models.get(model, self._curve)

    def slowest(self, models: Collection[str]) -> Curve:
        """Returns a curve that has the longest time of these models for each measured number of evaluations."""
        curves = {id(curve): curve for curve in map(self.of, models)} or {0: self._curve}
        if len(curves) == 1:
            return next(iter(curves.values()))
        measured = sorted({rows for curve in curves.values() for rows in curve.rows})
        return Curve({rows: max(curve.seconds(rows) for curve in curves.values()) for rows in measured})

    def further_calls_seconds(self, models: Collection[str], rows: int) -> float:
        """Returns the additional time of a step of at most `rows` rows because each of these models has its own call.

        Each further call adds at most the time of a call with one evaluation. There are no more calls than rows.
        """
        lone = sorted((self.of(model).seconds(1) for model in models), reverse=True)
        return sum(lone[: max(min(len(lone), rows) - 1, 0)])

    @property
    def best_rate(self) -> float:
        """Returns the best measured number of evaluations per second of the default model, at the speed of warm-up."""
        return self._curve.best_rate

    @property
    def clip_evaluations(self) -> int:
        """Returns the number of evaluations at the best rate that take as long as one row of a full call of CLIP."""
        return math.ceil(self.clip_seconds / CALL_ROWS * self.best_rate)

    def measured_seconds(self, calls: Mapping[str, int], with_clip: Mapping[str, int]) -> float:
        """Returns the seconds of a step at the speed of warm-up.

        `calls` has the number of evaluations of each network call, by model. `with_clip` has the number of rows with
        CLIP guidance, by model.
        """
        clip_calls = sum(math.ceil(count / CALL_ROWS) for count in with_clip.values())
        return sum(self.of(model).seconds(count) for model, count in calls.items()) + clip_calls * self.clip_seconds

    def observe(self, calls: Mapping[str, int], with_clip: Mapping[str, int], seconds: float) -> None:
        """Updates the slowdown after a step that took `seconds`. `measured_seconds` explains the other arguments."""
        if seconds <= 0:  # the clock is too coarse for this step
            return
        predicted = self.measured_seconds(calls, with_clip)
        seconds = min(seconds, MAX_JUMP * self.slowdown * predicted)
        kept = math.exp(-seconds / MEMORY_SECONDS)
        self.slowdown = 1 / (kept / self.slowdown + (1 - kept) * predicted / seconds)

    def step_seconds(self, evaluations: float) -> float:
        """Returns the predicted seconds of a step of the default model at the current speed of the machine."""
        return self.slowdown * self._curve.seconds(evaluations)
