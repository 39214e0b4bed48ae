"""Percentiles, and tables with the median and the range over repeats."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Table = tuple[tuple[str, ...], list[list[str]]]  # names of the columns, and cells of each line
MANY = 12  # from this number of repeats on, show quartiles, because the range depends only on two extreme repeats
COLUMNS = (  # explained in page.EXPLANATIONS
    "service",
    "load",
    "images/s",
    "images/s, ratio to the first",
    "in time, images/s",
    "p50, s",
    "p95, s",
    "p95, ratio to the first",
    "simulated p95, s",
    "replayed p95, s",
    "replayed p95 with request batching, s",
    "p99, s",
    "wait for the first step, s",
    "rows per step",
    "step time p95, s",
    "time outside the network",
    "share of the matrix rate",
    "share of the adjacent matrix rate",
    "memory, MiB",
)
KINDS = {"one": "1 image", "64": "64 images"}  # other kinds are shown with their names in the JSON file


def percentile(values: Sequence[float], share: float) -> float:
    """Returns the percentile by the nearest-rank method, for `share` in [0, 1]. Returns NaN if there are no values."""
    return float(np.quantile(values, share, method="inverted_cdf")) if values else float("nan")


def quantile(buckets: Mapping[float, float], share: float) -> float:
    """Returns a quantile of a histogram like Prometheus, by linear interpolation in a bucket.

    `buckets` has the cumulative counts by upper bound. The result never exceeds the largest finite bound.
    """
    rank = share * max(buckets.values())
    bounds = [0.0, *sorted(bound for bound in buckets if math.isfinite(bound))]
    counts = [0.0, *(buckets[bound] for bound in bounds[1:])]
    upper = min(int(np.searchsorted(counts, rank)), len(bounds) - 1)
    return float(np.interp(rank, counts[upper - 1 : upper + 1], bounds[upper - 1 : upper + 1]))


def with_spread(values: Sequence[float], digits: int = 3) -> str:
    """Returns the median with the range, or with the quartiles from MANY values on. An empty list gives a dash."""
    if len(values) < 2:
        return f"{values[0]:.{digits}g}" if values else "-"
    low, *_, high = statistics.quantiles(values) if len(values) >= MANY else sorted(values)
    return f"{statistics.median(values):.{digits}g} ({low:.{digits}g} - {high:.{digits}g})"


def plain_load(name: str) -> str:
    """Returns the name to show for a load. Converts the older names in published results to the current ones."""
    name = name.replace("0.7 of the slower's capacity", "70% of the slower service's capacity")
    name = name.replace("the same, every other of 10 steps", "70% of the slower service's capacity, half with 10 steps")
    return re.sub(r"^([\d.]+) of capacity$", lambda share: f"{100 * float(share[1]):g}% of capacity", name)


def plain_kind(kind: str) -> str:
    """Returns the name to show for a kind of request."""
    return KINDS.get(kind, kind)


def table_of(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Returns a line for each load, service and kind of request.

    Ratios compare a service with the first one under the same load. They are the median of the ratios of each repeat.
    """
    lines = []
    for load in dict.fromkeys(row["load"] for row in rows):
        by_contestant: dict[str, list[Mapping[str, Any]]] = {row["contestant"]: [] for row in rows}
        for row in rows:
            if row["load"] == load:
                by_contestant[row["contestant"]].append(row)
        first, *others = filter(None, by_contestant.values())
        lines += [_line(own, first, kind) for own in (first, *others) for kind in own[0]["latencies"]]
    return lines


def _line(own: Sequence[Mapping[str, Any]], first: Sequence[Mapping[str, Any]], kind: str) -> list[str]:
    load, is_first = plain_load(own[0]["load"]), own is first

    def p(share: int, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        return [row["latencies"][kind][f"p{share}"] for row in rows]

    def ratio(values: Sequence[float], of_first: Sequence[float]) -> str:
        return "-" if is_first else with_spread([a / b for a, b in zip(values, of_first, strict=True)])

    rates = [[row["images_a_second"] for row in rows] for rows in (own, first)]
    return [
        own[0]["contestant"],
        load if len(own[0]["latencies"]) == 1 else f"{load}: {plain_kind(kind)}",
        with_spread(rates[0]),
        ratio(*rates),
        _figure(own, "goodput"),
        with_spread(p(50, own)),
        with_spread(p(95, own)),
        ratio(p(95, own), p(95, first)),
        *(_figure(own, name) for name in ("predicted_p95", "replayed_p95", "batched_p95")),
        with_spread(p(99, own)),
        *(_figure(own, name) for name in ("seconds_to_first_step", "rows_a_step", "p95_of_steps")),
        *(_percent(own, name) for name in ("outside_network", "matrix_share", "adjacent_matrix_share")),
        _figure(own, "resident_megabytes"),
    ]


def without_empty(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    """Removes the columns in which every cell is a dash."""
    kept = [place for place in range(len(columns)) if any(line[place] != "-" for line in lines)]
    return tuple(columns[place] for place in kept), [[line[place] for place in kept] for line in lines]


def _figure(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    return with_spread([row[name] for row in rows if row.get(name) is not None])


def _percent(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """Returns the median in percent, or a dash."""
    values = [row[name] for row in rows if name in row]
    return f"{statistics.median(values):.1%}" if values else "-"
