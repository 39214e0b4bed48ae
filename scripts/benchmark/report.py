"""Numbers out of answers: rates, percentiles, and tables with the spread over repeats."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = (
    "contestant",
    "load",
    "images a second",
    "in time",
    "p50, s",
    "p95, s",
    "p95 simulated, s",
    "p99, s",
    "first step, s",
    "rows a step",
    "p95 of steps, s",
    "outside the network",
    "of the matrix rate",
    "of that beside it",
    "memory, MB",
)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of all do not exceed; NaN of none."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)] if ordered else float("nan")


def quantile(buckets: Mapping[float, float], share: float) -> float:
    """Of a histogram with cumulative counts by upper bound, linear within a bucket as Prometheus has it."""
    lower, below, total = 0.0, 0.0, max(buckets.values())
    for bound in sorted(buckets):
        if buckets[bound] >= share * total:
            if math.isinf(bound):
                return lower
            return lower + (bound - lower) * (share * total - below) / (buckets[bound] - below)
        lower, below = bound, buckets[bound]
    return float("nan")


def with_spread(values: Sequence[float], digits: int = 3) -> str:
    """Median, and the range where there is more than one; a dash for none."""
    if not values:
        return "-"
    middle = f"{statistics.median(values):.{digits}g}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}g} - {max(values):.{digits}g})"


def table_of(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A line for each contestant under each load, and for each kind of request in it."""
    lines = []
    for contestant, load in dict.fromkeys((row["contestant"], row["load"]) for row in rows):
        of_it = [row for row in rows if (row["contestant"], row["load"]) == (contestant, load)]
        kinds = of_it[0]["latencies"]
        for kind in kinds:
            latencies = [row["latencies"][kind] for row in of_it]
            lines.append(
                [
                    contestant,
                    load if len(kinds) == 1 else f"{load}: {kind}",
                    *(_figure(of_it, name) for name in ("images_a_second", "goodput")),
                    *(with_spread([found[share] for found in latencies]) for share in ("p50", "p95")),
                    _figure(of_it, "predicted_p95"),
                    with_spread([found["p99"] for found in latencies]),
                    *(_figure(of_it, name) for name in ("seconds_to_first_step", "rows_a_step", "p95_of_steps")),
                    *(_percent(of_it, name) for name in ("outside_network", "matrix_share", "matrix_share_beside")),
                    _figure(of_it, "resident_megabytes"),
                ]
            )
    return lines


def without_empty(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], list[list[str]]]:
    """The table without the columns in which nobody has a figure."""
    kept = [place for place in range(len(columns)) if any(line[place] != "-" for line in lines)]
    return tuple(columns[place] for place in kept), [[line[place] for place in kept] for line in lines]


def _figure(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    return with_spread([row[name] for row in rows if row.get(name) is not None])


def _percent(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """The median alone."""
    values = [row[name] for row in rows if name in row]
    return f"{statistics.median(values):.1%}" if values else "-"
