import math
from typing import Any

import pytest

from scripts.benchmark.report import COLUMNS, percentile, quantile, table_of, with_spread, without_empty


def test_percentiles() -> None:
    values = list(range(100, 0, -1))
    assert [percentile(values, share) for share in (0, 0.5, 0.95, 0.99, 1)] == [1, 50, 95, 99, 100]
    assert percentile([1.0, 2.0], 0.5) == 1.0
    assert math.isnan(percentile([], 0.5))


def test_a_figure_has_its_median_and_its_range() -> None:
    assert with_spread([3.0, 1.0, 2.0]) == "2 (1 - 3)"
    assert with_spread([1.23456]) == "1.23"
    assert with_spread([]) == "-"


def test_of_many_repeats_the_quartiles_are_told_as_the_range_is_that_of_the_oddest() -> None:
    assert with_spread([100.0, *range(2, 12)]) == "7 (2 - 100)"
    assert with_spread([*range(1, 15), 1000.0]) == "8 (4 - 12)"


def test_a_quantile_of_a_histogram_is_where_prometheus_would_see_it() -> None:
    buckets = {0.1: 10.0, 0.2: 30.0, 0.4: 40.0, math.inf: 40.0}  # 10 below 0.1, 20 from there to 0.2, 10 to 0.4
    assert quantile(buckets, 0.5) == pytest.approx(0.15)
    assert quantile(buckets, 0.875) == pytest.approx(0.3)
    assert quantile({0.1: 1.0, math.inf: 2.0}, 0.95) == 0.1  # beyond what the buckets tell apart
    assert quantile({0.1: 10.0, 0.2: 10.0, 0.4: 20.0, math.inf: 20.0}, 0.5) == 0.1  # the first bucket with half of all
    assert quantile({0.1: 10.0, 0.2: 10.0, 0.4: 20.0, math.inf: 20.0}, 0.75) == pytest.approx(0.3)


def row(repeat: int, load: str, rate: float, contestant: str = "unfog", **kinds: float) -> dict[str, Any]:
    latencies = {kind: {"p50": p50, "p95": 2 * p50, "p99": 3 * p50} for kind, p50 in kinds.items()}
    known = {"repeat": repeat, "contestant": contestant, "load": load, "images_a_second": rate, "latencies": latencies}
    return {**known, "goodput": rate / 2, "rows_a_step": 8.0, "outside_network": 0.05, "resident_megabytes": 300.0}


def test_the_table_has_the_median_and_the_range_over_repeats_a_line_a_kind_of_request() -> None:
    rows = [row(k, "mix", rate, short=rate / 10, long=rate) for k, rate in enumerate([3.0, 1.0, 2.0])]
    columns, (short, long) = without_empty(COLUMNS, table_of(rows))
    first = dict(zip(columns, short, strict=True))
    assert (first["contestant"], first["load"], first["images a second"]) == ("unfog", "mix: short", "2 (1 - 3)")
    assert (first["in time"], first["p50, s"], first["outside the network"]) == (
        "1 (0.5 - 1.5)",
        "0.2 (0.1 - 0.3)",
        "5.0%",
    )
    assert dict(zip(columns, long, strict=True))["p95, s"] == "4 (2 - 6)"
    assert {"p95 simulated, s", "first step, s", "of the first's", "of the first's p95"}.isdisjoint(
        columns
    )  # of which nobody has a figure


def test_contestants_are_held_against_the_first_in_pairs() -> None:
    ours = [row(k, load, rate, one=1.0) for k, rate in enumerate([1.0, 2.0, 10.0]) for load in ("idle", "full")]
    others = [(2.0, 3.0), (3.0, 2.0), (5.0, 5.0)]
    other = [row(k, "full", rate, "other", one=p50) for k, (rate, p50) in enumerate(others)]
    columns, lines = without_empty(COLUMNS, table_of([*ours, *other]))
    table = [dict(zip(columns, line, strict=True)) for line in lines]
    assert [(line["contestant"], line["load"]) for line in table] == [
        ("unfog", "idle"),
        ("unfog", "full"),
        ("other", "full"),
    ]
    assert [line["of the first's"] for line in table] == ["-", "-", "1.5 (0.5 - 2)"]  # 2 / 1, 3 / 2 and 5 / 10
    assert [line["of the first's p95"] for line in table] == ["-", "-", "3 (2 - 5)"]
