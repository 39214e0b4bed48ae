import math
from typing import Any

import pytest

from scripts.benchmark.report import (
    COLUMNS,
    percentile,
    plain_load,
    quantile,
    table_of,
    with_spread,
    without_empty,
)


def test_percentile_is_a_value_of_the_list() -> None:
    values = list(range(100, 0, -1))
    assert [percentile(values, share) for share in (0, 0.5, 0.95, 0.99, 1)] == [1, 50, 95, 99, 100]
    assert percentile([1.0, 2.0], 0.5) == 1.0
    assert math.isnan(percentile([], 0.5))


def test_with_spread_shows_the_median_and_the_range() -> None:
    assert with_spread([3.0, 1.0, 2.0]) == "2 (1 - 3)"
    assert with_spread([1.23456]) == "1.23"
    assert with_spread([]) == "-"


def test_with_spread_shows_the_quartiles_for_many_values() -> None:
    assert with_spread([100.0, *range(2, 12)]) == "7 (2 - 100)"
    assert with_spread([*range(1, 15), 1000.0]) == "8 (4 - 12)"


def test_quantile_of_a_histogram_is_that_of_prometheus() -> None:
    buckets = {0.1: 10.0, 0.2: 30.0, 0.4: 40.0, math.inf: 40.0}  # 10 values up to 0.1, 20 up to 0.2, 10 up to 0.4
    assert quantile(buckets, 0.5) == pytest.approx(0.15)
    assert quantile(buckets, 0.875) == pytest.approx(0.3)
    assert quantile({0.1: 1.0, math.inf: 2.0}, 0.95) == 0.1  # limited to the largest finite bound
    assert (
        quantile({0.1: 10.0, 0.2: 10.0, 0.4: 20.0, math.inf: 20.0}, 0.5) == 0.1
    )  # the first bucket that reaches one half
    assert quantile({0.1: 10.0, 0.2: 10.0, 0.4: 20.0, math.inf: 20.0}, 0.75) == pytest.approx(0.3)


def row(repeat: int, load: str, rate: float, contestant: str = "unfog", **kinds: float) -> dict[str, Any]:
    latencies = {kind: {"p50": p50, "p95": 2 * p50, "p99": 3 * p50} for kind, p50 in kinds.items()}
    known = {"repeat": repeat, "contestant": contestant, "load": load, "images_a_second": rate, "latencies": latencies}
    return {**known, "goodput": rate / 2, "rows_a_step": 8.0, "outside_network": 0.05, "resident_megabytes": 300.0}


def test_table_has_a_line_per_kind_of_request() -> None:
    rows = [row(k, "mix", rate, short=rate / 10, long=rate) for k, rate in enumerate([3.0, 1.0, 2.0])]
    columns, (short, long) = without_empty(COLUMNS, table_of(rows))
    first = dict(zip(columns, short, strict=True))
    assert (first["service"], first["load"], first["images/s"]) == ("unfog", "mix: short", "2 (1 - 3)")
    assert (first["in time, images/s"], first["p50, s"], first["time outside the network"]) == (
        "1 (0.5 - 1.5)",
        "0.2 (0.1 - 0.3)",
        "5.0%",
    )
    assert dict(zip(columns, long, strict=True))["p95, s"] == "4 (2 - 6)"
    empty = {
        "simulated p95, s",
        "wait for the first step, s",
        "images/s, ratio to the first",
        "p95, ratio to the first",
    }
    assert empty < set(COLUMNS)
    assert empty.isdisjoint(columns)


def test_table_has_the_median_of_the_ratios_to_the_first_service() -> None:
    ours = [row(k, load, rate, one=1.0) for k, rate in enumerate([1.0, 2.0, 10.0]) for load in ("idle", "full")]
    others = [(2.0, 3.0), (3.0, 2.0), (5.0, 5.0)]
    other = [row(k, "full", rate, "other", one=p50) for k, (rate, p50) in enumerate(others)]
    columns, lines = without_empty(COLUMNS, table_of([*ours, *other]))
    table = [dict(zip(columns, line, strict=True)) for line in lines]
    assert [(line["service"], line["load"]) for line in table] == [
        ("unfog", "idle"),
        ("unfog", "full"),
        ("other", "full"),
    ]
    assert [line["images/s, ratio to the first"] for line in table] == [
        "-",
        "-",
        "1.5 (0.5 - 2)",
    ]  # the ratios are 2 / 1, 3 / 2 and 5 / 10
    assert [line["p95, ratio to the first"] for line in table] == ["-", "-", "3 (2 - 5)"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("64 x 1 image", "64 x 1 image"),
        ("0.2 of capacity", "20% of capacity"),
        ("0.7 of the slower's capacity", "70% of the slower service's capacity"),
        ("the same, every other of 10 steps", "70% of the slower service's capacity, half with 10 steps"),
    ],
)
def test_older_names_of_loads_are_shown_as_the_current_names(name: str, shown: str) -> None:
    assert plain_load(name) == shown
