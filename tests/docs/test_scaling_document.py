"""docs/scaling.md has the tables of its JSON files, and what it says about them is true."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pytest

from scripts.benchmark.replicas import COLUMNS, SHARES, Inputs, errors_of, simulate, table_of
from scripts.benchmark.routers import ROUTERS
from scripts.benchmark.routing import DEADLINE, MIX, NUM_REPLICAS, OF_MIX, SEEDS, model_of
from scripts.benchmark.routing import tables_of as routing_tables
from scripts.benchmark.scaling import break_even, bytes_of_image, figure, inputs_in, process_rate
from scripts.benchmark.scaling import tables_of as scaling_tables
from scripts.evaluation.tables import as_table
from tests.docs.document import Document
from tests.docs.markdown import ROOT

RESULTS = ROOT / "docs" / "results"
DOCUMENT = Document("scaling.md")
CHECK = json.loads((RESULTS / "scaling-replicas.json").read_text())
ROUTING = json.loads((RESULTS / "scaling-routing.json").read_text())
INPUTS = inputs_in(RESULTS)
VALUES = {name: each["value"] for name, each in INPUTS.items()}
LARGEST_ERROR = 0.15


def latency(router: str, count: str, num_replicas: int, share: float, seconds: float = 0.0, name: str = "p95") -> float:
    """Returns a percentile of the latency of the requests for `count` images. The reports are `seconds` old."""
    found: float = row_of(router, num_replicas, share, seconds)["latencies"][count][name]
    return found


def latencies_of_seeds(router: str, count: str, num_replicas: int, share: float) -> list[float]:
    """The 95th percentiles of the single simulations, with present numbers of images."""
    found: list[float] = row_of(router, num_replicas, share, 0.0)["p95_of_seeds"][count]
    return found


def row_of(router: str, num_replicas: int, share: float, seconds: float) -> Mapping[str, Any]:
    (row,) = (
        row
        for row in ROUTING["rows"]
        if (row["load"], row["router"], row["num_replicas"]) == (MIX, router, num_replicas)
        and (row["share"], row["report_seconds"]) == (share, seconds)
    )
    found: Mapping[str, Any] = row
    return found


def test_tables_are_computed_from_the_files() -> None:
    tables = {**scaling_tables(INPUTS), **routing_tables(ROUTING["rows"])}
    tables["check"] = as_table(COLUMNS, table_of(CHECK["rows"]))
    assert [name for name, table in tables.items() if table not in DOCUMENT.text] == []


def test_figures_in_the_text_are_those_of_the_files() -> None:
    used = max(row["cores"]["clients"] + row["cores"]["HAProxy"] for row in CHECK["rows"])
    assert f"and use at most {used:.2f} of a core together" in DOCUMENT.text
    assert f"in {CHECK['num_steps']} steps" in DOCUMENT.text
    assert f"from {figure(break_even(VALUES))} images/s on" in DOCUMENT.text
    assert VALUES["images_per_core_fast"] / VALUES["images_per_core_default"] == pytest.approx(20, rel=0.1)
    assert process_rate(VALUES) < VALUES["gpu_images_low"]
    ratio = bytes_of_image(VALUES, with_previews=True) / bytes_of_image(VALUES, with_previews=False)
    assert ratio == pytest.approx(10, abs=1)
    of_images = [count * share / sum(n * part for n, part in OF_MIX.items()) for count, share in OF_MIX.items()]
    assert all(0.2 < share < 0.5 for share in of_images)


@pytest.mark.parametrize("share", SHARES)
def test_simulated_p95_is_within_the_limit_in_each_repeat(share: float) -> None:
    rows = [row for row in CHECK["rows"] if row["share"] == share]
    assert max(map(abs, errors_of(rows, "p95"))) <= LARGEST_ERROR
    assert len(rows) >= 3
    assert sum(row["requests"] for row in rows) >= 1000


def test_simulation_of_the_stored_inputs_gives_the_stored_percentiles() -> None:
    for number, row in enumerate(CHECK["rows"][: len(SHARES)]):
        assert simulate(stored_inputs(), row, number, CHECK["seconds"]) == pytest.approx(row["simulated"])


def test_error_with_a_steady_pace_is_that_of_the_text() -> None:
    errors, steady = list[float](), {"paces": [[1.0]] * 2}
    for number, row in enumerate(CHECK["rows"]):
        found = simulate(stored_inputs(), row | steady, number, CHECK["seconds"])
        errors += errors_of([row | {"simulated": found}], "p95")
    assert f"wrong by {min(errors):+.0%} to {max(errors):+.0%}" in DOCUMENT.text
    slowest = max(factor for row in CHECK["rows"] for factors in row["paces"] for factor in factors)
    assert f"up to {slowest:.1f} times slower than usual" in DOCUMENT.text


def stored_inputs() -> Inputs:
    stored = CHECK["inputs"]
    of_rows = ("seconds_by_rows", "usual")
    by_rows = {name: {int(rows): seconds for rows, seconds in stored[name].items()} for name in of_rows}
    return Inputs(**{**stored, **by_rows})


def test_routers_are_compared_with_the_measured_replica() -> None:
    assert ROUTING["model"] == json.loads(json.dumps(asdict(model_of(CHECK["inputs"]))))


@pytest.mark.parametrize(("num_replicas", "share"), list(itertools.product(NUM_REPLICAS, (0.7, 0.9, 0.95))))
def test_least_connections_is_the_best_rule_for_small_requests(num_replicas: int, share: float) -> None:
    others = {name: latency(name, "1", num_replicas, share) for name in ROUTERS if name != "least connections"}
    if (num_replicas, share) == (64, 0.7):
        del others["least images"]
    assert latency("least connections", "1", num_replicas, share) <= 1.1 * min(others.values())
    if num_replicas > 2:
        assert latency("least connections", "1", num_replicas, share) < others["two by requests"]


def test_half_of_the_small_requests_in_a_large_cell_take_as_long_as_on_an_idle_replica() -> None:
    model, num_steps = ROUTING["model"], ROUTING["num_steps"]
    idle = num_steps * model["seconds_by_rows"]["1"] + model["delay_seconds"]
    assert latency("least connections", "1", 64, 0.7, name="p50") == pytest.approx(idle, rel=0.01)


def test_routing_by_images_helps_large_requests_and_delays_small_ones() -> None:
    before, after = (
        {count: latency(router, count, 8, 0.9) for count in ("1", "64")}
        for router in ("least connections", "least images")
    )
    assert after["64"] < before["64"] and after["1"] > before["1"]
    assert f"64 images from {before['64']:.1f} s to {after['64']:.1f} s" in DOCUMENT.text
    assert f"one image from {before['1']:.2f} s to {after['1']:.2f} s" in DOCUMENT.text
    pairs = {
        count: [latencies_of_seeds(router, count, 8, 0.9) for router in ("least connections", "least images")]
        for count in ("1", "64")
    }
    assert all(by_images < by_requests for by_requests, by_images in zip(*pairs["64"], strict=True))
    assert all(by_images > by_requests for by_requests, by_images in zip(*pairs["1"], strict=True))


def test_old_numbers_of_images_do_not_help_small_requests() -> None:
    for share in (0.7, 0.9):
        assert latency("least images", "1", 64, share, 0.1) > latency("least connections", "1", 64, share)
    for num_replicas in (8, 64):
        assert latency("least images", "1", num_replicas, 0.9, 1.0) > latency("round robin", "1", num_replicas, 0.9)


def test_with_deadlines_routing_by_images_avoids_most_refusals() -> None:
    refused = {
        (row["router"], row["share"]): row["refused"]
        for row in ROUTING["rows"]
        if row["load"] == DEADLINE and not row["report_seconds"]
    }
    for share in (0.9, 0.95):
        assert refused["least images", share] <= 0.5 * refused["least connections", share]


def test_refused_requests_are_large_ones() -> None:
    of_least_connections = [
        row["refused_by_images"]
        for row in ROUTING["rows"]
        if (row["load"], row["router"]) == (DEADLINE, "least connections")
    ]
    assert len(of_least_connections) == 2
    for refused in of_least_connections:
        assert refused["64"] == sum(refused.values()) > 0


def test_text_says_how_much_the_95th_percentiles_differ_between_seeds() -> None:
    rows = [row for row in ROUTING["rows"] if row["load"] == MIX and (row["share"] == 0.9 or row["num_replicas"] == 8)]
    assert {len(row["p95_of_seeds"]["1"]) for row in rows} == {len(SEEDS)}
    usual = len(SEEDS) * ROUTING["requests"]
    assert min(row["requests"] for row in rows) >= 0.9 * usual  # arrivals are random
    of_one, of_many = (
        max(abs(p95 / row["latencies"][count]["p95"] - 1) for row in rows for p95 in row["p95_of_seeds"][count])
        for count in ("1", "64")
    )
    text = " ".join(DOCUMENT.text.split())
    assert f"differs by up to {of_one:.0%} for 1 image and by up to {of_many:.0%} for 64 images" in text


def test_almost_nothing_is_refused_below_the_capacity_without_short_deadlines() -> None:
    most = max(row["refused"] for row in ROUTING["rows"] if row["load"] == MIX)
    assert 0 < most <= 0.0001
    assert "At most 0.01% of the requests of these loads were refused." in DOCUMENT.text


def test_prices_are_assumptions_and_figures_of_gpus_are_estimates() -> None:
    kinds: Mapping[str, Any] = {name: each["kind"] for name, each in INPUTS.items()}
    assert {kinds[name] for name in kinds if name.startswith("price")} == {"assumption"}
    assert {kinds[name] for name in kinds if name.startswith("gpu")} == {"estimate"}
