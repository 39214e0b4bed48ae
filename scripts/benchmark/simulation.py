"""What a service would do whose only cost is the steps: the same arrivals, on the step times that were measured."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np


def step_times(seconds_by_rows: Mapping[int, float]) -> Callable[[int], float]:
    """Seconds of a step of so many rows: linear between those measured, in proportion to the last one above."""
    rows = sorted(seconds_by_rows)
    seconds = [seconds_by_rows[count] for count in rows]

    def step_seconds(count: int) -> float:
        return float(np.interp(count, rows, seconds)) * max(1.0, count / rows[-1])

    return step_seconds


@dataclass(frozen=True, slots=True)
class Fate:
    """Of one request."""

    due: float
    done: float

    @property
    def latency(self) -> float:
        """From when it was due."""
        return self.done - self.due


def simulate(
    times: Iterable[float], until: float, num_steps: int, most_rows: int, step_seconds: Callable[[int], float]
) -> list[Fate]:
    """Requests of one image that are due before `until`: all that are there take part in every step, the oldest first.

    Those that come later are there too until the last of the others is done.
    """
    coming, fates = iter(times), list[Fate]()
    running: list[list[float]] = []  # [due, steps left]
    now, due = 0.0, next(coming)
    while due < until or any(at < until for at, _ in running):
        if not running:
            now = max(now, due)
        while due <= now:
            running.append([due, num_steps])
            due = next(coming)
        rows = running[:most_rows]
        now += step_seconds(len(rows))
        for row in rows:
            row[1] -= 1
        fates += [Fate(at, now) for at, left in rows if not left and at < until]
        running = [row for row in running if row[1]]
    return fates
