"""What a service would do whose only cost is the steps: the same arrivals, on the step times that were measured."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean
from typing import Any, NamedTuple

import numpy as np

from scripts.benchmark.clients import arrivals
from scripts.benchmark.loads import NUM_STEPS
from scripts.benchmark.report import percentile
from scripts.common.errors import ScriptError

STEP_ROWS = (1, 2, 4, 8, 16, 32, 64)  # the rows of the steps that are timed


def step_times(seconds_by_rows: Mapping[int, float]) -> Callable[[float], float]:
    """Seconds of a step of so many rows: linear between those measured, in proportion to the last one above."""
    rows = sorted(seconds_by_rows)
    seconds = [seconds_by_rows[count] for count in rows]

    def step_seconds(count: float) -> float:
        return float(np.interp(count, rows, seconds)) * max(1.0, count / rows[-1])

    return step_seconds


class Moment(NamedTuple):
    """What a service had done so many seconds after a load began."""

    at: float
    steps: float
    rows: float  # of all steps
    seconds: float  # in the networks' calls


def slowness(moments: Sequence[Moment], step_seconds: Callable[[float], float]) -> Callable[[float], float]:
    """How many times longer than `step_seconds` the steps took at a time; 1 where there were none at all.

    A machine that others use too is not equally fast for long: between two moments it is what the steps of that time
    say, and changes evenly from the middle of one such time to that of the next.
    """
    times, factors = list[float](), list[float]()
    for before, after in pairwise(moments):
        if steps := after.steps - before.steps:
            expected = steps * step_seconds((after.rows - before.rows) / steps)
            times.append((before.at + after.at) / 2)
            factors.append((after.seconds - before.seconds) / expected)
    return lambda at: float(np.interp(at, times, factors)) if times else 1.0


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
    times: Iterable[float],
    until: float,
    num_steps: int,
    most_rows: int,
    step_seconds: Callable[[float], float],
    slowness: Callable[[float], float] = lambda at: 1.0,
) -> list[Fate]:
    """Requests of one image that are due before `until`: all that are there take part in every step, the oldest first.

    A step takes `step_seconds` of its rows times `slowness` of the time at which it begins.
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
        now += step_seconds(len(rows)) * slowness(now)
        for row in rows:
            row[1] -= 1
        fates += [Fate(at, now) for at, left in rows if not left and at < until]
        running = [row for row in running if row[1]]
    return fates


def simulate_batches(
    times: Iterable[float],
    until: float,
    num_steps: int,
    most_rows: int,
    step_seconds: Callable[[float], float],
    slowness: Callable[[float], float] = lambda at: 1.0,
) -> list[Fate]:
    """The same requests in batches of whole ones: all that wait when the last batch ends, the oldest first."""
    coming, fates, waiting = iter(times), list[Fate](), list[float]()
    now, due = 0.0, next(coming)
    while due < until or any(at < until for at in waiting):
        if not waiting:
            now = max(now, due)
        while due <= now:
            waiting.append(due)
            due = next(coming)
        batch, waiting = waiting[:most_rows], waiting[most_rows:]
        for _ in range(num_steps):
            now += step_seconds(len(batch)) * slowness(now)
        fates += [Fate(at, now) for at in batch if at < until]
    return fates


def predicted_p95(fates: Sequence[Fate], opens: float) -> float:
    """Of the latencies of those that are due from `opens` on."""
    return percentile([fate.latency for fate in fates if opens <= fate.due], 0.95)


def predictions(row: Mapping[str, Any], opens: float, closes: float) -> dict[str, float]:
    """Returns the 95th percentiles of latency that simulations give for the arrivals of a measurement.

    `row` is a measurement under an open loop, whose window was from `opens` to `closes` seconds. `predicted_p95` is for
    the step times that were measured before and after it. `replayed_p95` is for the service's own step times.
    `batched_p95` is for batches of whole requests with the service's step times. Raises ScriptError if the service's
    metrics are missing.
    """
    looks = [look["seconds_by_rows"] for look in row["beside"]]
    bare = step_times({rows: mean(look[rows] for look in looks) for rows in STEP_ROWS})
    if len(row["moments"]) < 2:
        raise ScriptError("the service's metrics could not be read under load")
    own = slowness(row["moments"], bare)
    loops = {
        "predicted_p95": (simulate, lambda at: 1.0),
        "replayed_p95": (simulate, own),
        "batched_p95": (simulate_batches, own),
    }
    return {
        name: predicted_p95(
            loop(arrivals(row["rate"], row["repeat"]), closes, NUM_STEPS, STEP_ROWS[-1], bare, factor), opens
        )
        for name, (loop, factor) in loops.items()
    }
