"""Simulates a service whose only cost is the time of its steps, with the same arrivals as a measurement."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean
from typing import Any, NamedTuple

import numpy as np

from app.engine.step_times import Curve
from scripts.benchmark.clients import arrivals
from scripts.benchmark.loads import NUM_STEPS
from scripts.benchmark.report import percentile
from scripts.common.errors import ScriptError

STEP_ROWS = (1, 2, 4, 8, 16, 32, 64)  # numbers of rows for which the step time is measured


class Moment(NamedTuple):
    """The counters of a service at one time of a load."""

    at: float  # seconds since the load began
    steps: float
    rows: float  # number of rows, summed over all steps
    seconds: float  # time spent in network calls


def slowness(moments: Sequence[Moment], step_seconds: Callable[[float], float]) -> Callable[[float], float]:
    """Returns a function from time to the ratio of the measured step times to `step_seconds`.

    The speed of a shared machine changes. The ratio is computed for each interval between two samples, and interpolated
    linearly between the middles of the intervals. It is 1 if no interval has steps.
    """
    times, factors = list[float](), list[float]()
    for before, after in pairwise(moments):
        if steps := after.steps - before.steps:
            expected = steps * step_seconds((after.rows - before.rows) / steps)
            times.append((before.at + after.at) / 2)
            factors.append((after.seconds - before.seconds) / expected)
    return lambda at: float(np.interp(at, times, factors)) if times else 1.0


@dataclass(frozen=True, slots=True)
class SimulatedRequest:
    """The planned time and the completion time of a request, in seconds since the load began."""

    due: float
    done: float

    @property
    def latency(self) -> float:
        """The seconds from the planned time to completion."""
        return self.done - self.due


def simulate(
    times: Iterable[float],
    until: float,
    num_steps: int,
    most_rows: int,
    step_seconds: Callable[[float], float],
    slowness: Callable[[float], float] = lambda at: 1.0,
) -> list[SimulatedRequest]:
    """Simulates step-level batching of requests for one image. Returns the requests planned before `until`.

    Each step has the oldest requests, at most `most_rows`. It takes `step_seconds(rows) * slowness(start)` seconds.
    Later requests take part too, until the last returned request is complete.
    """
    coming, completed = iter(times), list[SimulatedRequest]()
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
        completed += [SimulatedRequest(at, now) for at, left in rows if not left and at < until]
        running = [row for row in running if row[1]]
    return completed


def simulate_batches(
    times: Iterable[float],
    until: float,
    num_steps: int,
    most_rows: int,
    step_seconds: Callable[[float], float],
    slowness: Callable[[float], float] = lambda at: 1.0,
) -> list[SimulatedRequest]:
    """Simulates request-level batching, with arguments like `simulate`.

    When a batch ends, the oldest waiting requests form the next batch.
    """
    coming, completed, waiting = iter(times), list[SimulatedRequest](), list[float]()
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
        completed += [SimulatedRequest(at, now) for at in batch if at < until]
    return completed


def predicted_p95(requests: Sequence[SimulatedRequest], opens: float) -> float:
    """Returns the 95th percentile of the latency of the requests planned at `opens` or later."""
    return percentile([request.latency for request in requests if opens <= request.due], 0.95)


def predictions(row: Mapping[str, Any], opens: float, closes: float) -> dict[str, float]:
    """Simulates the arrivals of a measurement and returns 95th percentiles of the latency in seconds.

    `row` is a measurement in an open loop. Its window was from `opens` to `closes` seconds. `predicted_p95` uses the
    step times measured before and after it. `replayed_p95` uses the step times of the service under load.
    `batched_p95` uses the same step times with request-level batching. Raises ScriptError if the metrics of the service
    are missing.
    """
    measured = [around["seconds_by_rows"] for around in row["adjacent"]]
    bare = Curve({rows: mean(seconds[rows] for seconds in measured) for rows in STEP_ROWS}).seconds
    if len(row["moments"]) < 2:
        raise ScriptError("GET /metrics of the service failed under load. Measure again, with a longer --seconds")
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
