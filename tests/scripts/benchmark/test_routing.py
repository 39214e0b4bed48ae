"""Tests of the comparison of routers."""

import itertools
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from scripts import bench
from scripts.benchmark import routing
from scripts.benchmark.cluster_simulation import ReplicaModel
from scripts.benchmark.routing import DEADLINE, LOADS, MIX, SINGLE, Case, arrivals_of, model_of, result_of, tables_of

MODEL = ReplicaModel({1: 4e-3, 2: 6e-3, 4: 0.01, 8: 0.018, 16: 0.032, 32: 0.065}, 3e-3, 6e-3)


def test_model_has_the_measured_inputs() -> None:
    assert model_of(json.loads(json.dumps(asdict(MODEL)))) == MODEL


def test_mix_has_its_shares_and_its_rate() -> None:
    found = list(itertools.islice(arrivals_of(MIX, 20, 50.0, 1), 20_000))
    counts = Counter(arrival.request.count for arrival in found)
    assert {count: counts[count] / 20_000 for count in counts} == pytest.approx(LOADS[MIX], rel=0.1)
    assert found[-1].at == pytest.approx(20_000 / 50.0, rel=0.03)


def test_each_load_has_every_share_of_its_requests() -> None:
    assert [sum(shares.values()) for shares in LOADS.values()] == pytest.approx([1.0] * len(LOADS))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the simulations short."""
    monkeypatch.setattr(routing, "LEAST_SECONDS", 5.0)
    monkeypatch.setattr(routing, "SEEDS", (1,))


@pytest.mark.usefixtures("short")
def test_rate_is_the_share_of_the_capacity_of_all_replicas() -> None:
    row = result_of(Case(SINGLE, 3, 0.5, "round robin", 0.0), MODEL, 20, 300)
    per_image = 20 * min(seconds / rows for rows, seconds in MODEL.seconds_by_rows.items()) + MODEL.request_seconds
    assert row["rate"] == pytest.approx(3 * 0.5 / per_image)
    assert row["refused"] == row["late"] == 0
    assert row["requests"] == pytest.approx(300, rel=0.2)


@pytest.mark.usefixtures("short")
def test_routing_simulates_all_cases_and_prints_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    routers = [("random", 0.0), ("two by images", 0.1)]
    cases = [Case(load, 8, 0.9, router, seconds) for load in (MIX, DEADLINE) for router, seconds in routers]
    monkeypatch.setattr(routing, "CASES", cases)
    monkeypatch.setattr(routing, "ProcessPoolExecutor", SameProcess)
    measured, out = tmp_path / "replicas.json", tmp_path / "routing.json"
    measured.write_text(json.dumps({"num_steps": 10, "inputs": asdict(MODEL)}))
    bench.main(["routing", str(measured), "--requests=500", f"--out={out}"])
    content = json.loads(out.read_text())
    assert [(row["load"], row["router"], row["report_seconds"]) for row in content["rows"]] == [
        (case.load, case.router, case.report_seconds) for case in cases
    ]
    printed = capsys.readouterr().out
    for table in tables_of(content["rows"]).values():
        assert table in printed
    of_one, of_many = (content["rows"][1]["latencies"][count]["p95"] for count in ("1", "64"))
    assert f"| two by images, 0.1 s old | {of_one:.2f} and {of_many:.1f} |" in printed
    assert f"| two by images, 0.1 s old | {content['rows'][3]['refused']:.2%} |" in printed


class SameProcess:
    """Replaces the pool of processes, which would import all modules again."""

    def __init__(self, *_: object) -> None:
        self.map = map

    def __enter__(self) -> "SameProcess":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.usefixtures("short")
def test_figures_are_those_of_all_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    case, found = Case(MIX, 2, 0.9, "random", 0.0), list[dict[str, Any]]()
    for seeds in ((1,), (2,), (1, 2)):
        monkeypatch.setattr(routing, "SEEDS", seeds)
        found.append(result_of(case, MODEL, 5, 400))
    first, second, both = found
    assert both["requests"] == first["requests"] + second["requests"]
    p95s = [row["latencies"]["1"]["p95"] for row in found]
    assert min(p95s[:2]) < p95s[2] < max(p95s[:2])
    assert both["p95_of_seeds"]["1"] == p95s[:2]


@pytest.mark.usefixtures("short")
def test_result_is_the_same_in_every_run() -> None:
    case = Case(MIX, 2, 0.9, "least images", 0.1)
    assert result_of(case, MODEL, 5, 200) == result_of(case, MODEL, 5, 200)


@pytest.mark.usefixtures("short")
def test_requests_that_would_miss_their_deadline_are_refused() -> None:
    rows = {load: result_of(Case(load, 2, 0.95, "random", 0.0), MODEL, 20, 1000) for load in LOADS}
    refused = {load: row["refused"] for load, row in rows.items()}
    assert refused[DEADLINE] > 0 == refused[SINGLE] == refused[MIX]
    by_images = rows[DEADLINE]["refused_by_images"]
    assert sum(by_images.values()) == pytest.approx(refused[DEADLINE] * rows[DEADLINE]["requests"])
