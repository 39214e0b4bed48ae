"""Numbers out of answers: rates, percentiles, and tables with the spread over repeats."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Table = tuple[tuple[str, ...], list[list[str]]]  # columns and lines
MANY = 12  # repeats, of which the range would be that of the two oddest
COLUMNS = (
    "contestant",
    "load",
    "images a second",
    "of the first's",
    "in time",
    "p50, s",
    "p95, s",
    "of the first's p95",
    "p95 simulated, s",
    "p95 replayed, s",
    "p95 replayed in batches, s",
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
    """Returns the smallest value such that at least this share of all values is not larger; NaN without values."""
    return float(np.quantile(values, share, method="inverted_cdf")) if values else float("nan")


def quantile(buckets: Mapping[float, float], share: float) -> float:
    """Returns a quantile of a histogram as Prometheus does: linear within a bucket.

    `buckets` has the cumulative counts by upper bound. The result never exceeds the largest finite bound.
    """
    rank = share * max(buckets.values())
    bounds = [0.0, *sorted(bound for bound in buckets if math.isfinite(bound))]
    counts = [0.0, *(buckets[bound] for bound in bounds[1:])]
    upper = min(int(np.searchsorted(counts, rank)), len(bounds) - 1)
    return float(np.interp(rank, counts[upper - 1 : upper + 1], bounds[upper - 1 : upper + 1]))


def with_spread(values: Sequence[float], digits: int = 3) -> str:
    """Median, and the range where there is more than one, of MANY their quartiles; a dash for none."""
    if len(values) < 2:
        return f"{values[0]:.{digits}g}" if values else "-"
    low, *_, high = statistics.quantiles(values) if len(values) >= MANY else sorted(values)
    return f"{statistics.median(values):.{digits}g} ({low:.{digits}g} - {high:.{digits}g})"


def table_of(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A line for each contestant under each load, and for each kind of request in it.

    The others are held against the first of them in pairs: of each repeat the quotient.
    """
    lines = []
    for load in dict.fromkeys(row["load"] for row in rows):
        by_contestant: dict[str, list[Mapping[str, Any]]] = {row["contestant"]: [] for row in rows}
        for row in rows:
            if row["load"] == load:
                by_contestant[row["contestant"]].append(row)
        first, *others = filter(None, by_contestant.values())
        lines += [_line(of_it, first, kind) for of_it in (first, *others) for kind in of_it[0]["latencies"]]
    return lines


def _line(of_it: Sequence[Mapping[str, Any]], first: Sequence[Mapping[str, Any]], kind: str) -> list[str]:
    load, is_first = of_it[0]["load"], of_it is first

    def p(share: int, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        return [row["latencies"][kind][f"p{share}"] for row in rows]

    def beside(own: Sequence[float], others: Sequence[float]) -> str:
        return "-" if is_first else with_spread([a / b for a, b in zip(own, others, strict=True)])

    rates = [[row["images_a_second"] for row in rows] for rows in (of_it, first)]
    return [
        of_it[0]["contestant"],
        load if len(of_it[0]["latencies"]) == 1 else f"{load}: {kind}",
        with_spread(rates[0]),
        beside(*rates),
        _figure(of_it, "goodput"),
        with_spread(p(50, of_it)),
        with_spread(p(95, of_it)),
        beside(p(95, of_it), p(95, first)),
        *(_figure(of_it, name) for name in ("predicted_p95", "replayed_p95", "batched_p95")),
        with_spread(p(99, of_it)),
        *(_figure(of_it, name) for name in ("seconds_to_first_step", "rows_a_step", "p95_of_steps")),
        *(_percent(of_it, name) for name in ("outside_network", "matrix_share", "matrix_share_beside")),
        _figure(of_it, "resident_megabytes"),
    ]


def without_empty(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    """The table without the columns in which nobody has a figure."""
    kept = [place for place in range(len(columns)) if any(line[place] != "-" for line in lines)]
    return tuple(columns[place] for place in kept), [[line[place] for place in kept] for line in lines]


def _figure(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    return with_spread([row[name] for row in rows if row.get(name) is not None])


def _percent(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """The median alone."""
    values = [row[name] for row in rows if name in row]
    return f"{statistics.median(values):.1%}" if values else "-"
