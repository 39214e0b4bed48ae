"""Compares routers in the simulation of cluster_simulation.py.

The replicas have the speed that `python -m scripts.bench replicas` has measured, the default settings of the service,
and one thread. All routers get the same arrivals.
"""

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from app.engine.job import JobRequest, Options
from model.files import write_json
from scripts.benchmark.clients import arrivals
from scripts.benchmark.cluster_simulation import (
    LATE,
    OK,
    REFUSED,
    Arrival,
    Cluster,
    Outcome,
    ReplicaModel,
    percentiles_of,
)
from scripts.benchmark.routers import BY_IMAGES, ROUTERS
from scripts.common.progress import Reporter
from scripts.evaluation.tables import as_table

NUM_REPLICAS = (2, 8, 64)
SHARES = (0.5, 0.7, 0.9, 0.95)  # of the capacity
# How old the numbers of images can be that a router knows, in seconds. 0: it always knows the present numbers.
REPORT_SECONDS = (0.0, 0.1, 1.0)
SINGLE, MIX, DEADLINE = "one image", "mix", "mix, deadline of 10 s"
# The share of the requests by their number of images. No trace of real requests was available. The mix has the extremes
# of what the service accepts by default, and a quarter to a half of its images come from each kind of request.
OF_MIX = {1: 0.90, 8: 0.08, 64: 0.02}
LOADS: dict[str, dict[int, float]] = {SINGLE: {1: 1.0}, MIX: OF_MIX, DEADLINE: OF_MIX}
TIMEOUTS = {DEADLINE: 10.0}  # seconds; the other loads have the default of the service, at least 30 s
# Each case is simulated once with each seed. One short simulation is not enough: requests that arrive at about the same
# time wait in the same queue and have similar latencies, so the 95th percentile depends on a few bursts.
SEEDS = (1, 2, 3)
LEAST_SECONDS = 150.0  # of each simulation, without the first fifth, which does not count


@dataclass(frozen=True, slots=True)
class Case:
    """A simulation: a load, and replicas behind a router."""

    load: str
    num_replicas: int
    share: float
    router: str
    report_seconds: float


def measure_routing(measured: Path, requests: int, out: Path, reporter: Reporter) -> None:
    """Simulates all cases, writes the results and prints the tables.

    `measured` is the JSON file of the mode `replicas`. `requests` is the number of requests that count, per case and
    seed.
    """
    content = json.loads(measured.read_text())
    model, num_steps = model_of(content["inputs"]), content["num_steps"]
    rows = list[dict[str, Any]]()
    processes = ProcessPoolExecutor(os.cpu_count(), get_context("spawn"))
    with processes as pool, reporter.task("simulating", len(CASES), "cases") as task:
        arguments = zip(*((case, model, num_steps, requests) for case in CASES), strict=True)
        for row in pool.map(result_of, *arguments):
            rows.append(row)
            task.advance(1)
            write_json(out, {"model": asdict(model), "num_steps": num_steps, "requests": requests, "rows": rows})
    for title, table in tables_of(rows).items():
        reporter.line(f"{title}\n{table}")


def model_of(inputs: Mapping[str, Any]) -> ReplicaModel:
    """Returns a replica with the inputs that the mode `replicas` has stored."""
    seconds = {int(rows): seconds for rows, seconds in inputs["seconds_by_rows"].items()}
    return ReplicaModel(seconds, inputs["request_seconds"], inputs["delay_seconds"])


def result_of(case: Case, model: ReplicaModel, num_steps: int, requests: int) -> dict[str, Any]:
    """Returns the figures of a case over all seeds. The requests of the first fifth of the time do not count."""
    shares = LOADS[case.load]
    mean_images = sum(count * share for count, share in shares.items())
    rate = case.share * case.num_replicas * model.capacity(mean_images * num_steps)
    counted_seconds = max(requests / rate, LEAST_SECONDS)
    settle, until = 0.25 * counted_seconds, 1.25 * counted_seconds
    of_seeds = list[list[Outcome]]()
    for seed in SEEDS:
        cluster = Cluster(model, case.num_replicas, ROUTERS[case.router](seed), case.report_seconds)
        outcomes = cluster.run(arrivals_of(case.load, num_steps, rate, seed), until)
        of_seeds.append([outcome for outcome in outcomes if outcome.at >= settle])
    return {**asdict(case), "rate": rate, **_figures_of(of_seeds)}


def arrivals_of(load: str, num_steps: int, rate: float, seed: int) -> Iterator[Arrival]:
    """Yields random arrivals of a load at this rate."""
    choose, options = random.Random(f"images {seed}"), Options(0, 0, num_steps, "dpmpp", 1.0)
    requests = [JobRequest(options, count, timeout=TIMEOUTS.get(load)) for count in LOADS[load]]
    shares = list(LOADS[load].values())
    for at in arrivals(rate, seed):
        yield Arrival(at, choose.choices(requests, shares)[0])


def _figures_of(of_seeds: Sequence[Sequence[Outcome]]) -> dict[str, Any]:
    outcomes = list(chain.from_iterable(of_seeds))
    counts = sorted({outcome.images for outcome in outcomes})
    refused = Counter(outcome.images for outcome in outcomes if outcome.status == REFUSED)
    return {
        "requests": len(outcomes),
        "refused": refused.total() / len(outcomes),
        "refused_by_images": {f"{count}": refused[count] for count in counts},
        "late": sum(outcome.status == LATE for outcome in outcomes) / len(outcomes),
        "latencies": {f"{count}": percentiles_of(_latencies_of(outcomes, count)) for count in counts},
        "p95_of_seeds": {
            f"{count}": [percentiles_of(_latencies_of(each, count))["p95"] for each in of_seeds] for count in counts
        },
    }


def _latencies_of(outcomes: Iterable[Outcome], count: int) -> list[float]:
    """Returns the latencies of the answered requests for `count` images."""
    return [outcome.latency for outcome in outcomes if outcome.status == OK and outcome.images == count]


def _cases() -> Iterator[Case]:
    loads = [(MIX, num_replicas, share) for num_replicas in NUM_REPLICAS for share in SHARES]
    loads += [(SINGLE, 8, 0.9), *((DEADLINE, 8, share) for share in SHARES[-2:])]
    for load, num_replicas, share in loads:
        for router in ROUTERS:
            for seconds in REPORT_SECONDS if router in BY_IMAGES else (0.0,):
                yield Case(load, num_replicas, share, router, seconds)


CASES = tuple(_cases())


def tables_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Returns the tables by title. They have a line for each router."""

    def of(load: str, **fixed: float) -> list[Mapping[str, Any]]:
        return [row for row in rows if row["load"] == load and fixed.items() <= row.items()]

    return {
        "By number of replicas": _table(of(MIX, share=0.9), "num_replicas", "{} replicas", _latencies),
        "By load": _table(of(MIX, num_replicas=8), "share", "{:g} of the capacity", _latencies),
        "With deadlines": _table(of(DEADLINE, num_replicas=8), "share", "{:g} of the capacity", _refusals),
    }


def _table(
    rows: Sequence[Mapping[str, Any]], column: str, title: str, cell_of: Callable[[Mapping[str, Any]], str]
) -> str:
    values = list(dict.fromkeys(row[column] for row in rows))
    lines = []
    for router, seconds in dict.fromkeys((row["router"], row["report_seconds"]) for row in rows):
        found = {row[column]: row for row in rows if (row["router"], row["report_seconds"]) == (router, seconds)}
        name = f"{router}, {seconds:g} s old" if seconds else router
        lines.append([name, *(cell_of(found[value]) for value in values)])
    return as_table(("router", *(title.format(value) for value in values)), lines)


def _latencies(row: Mapping[str, Any]) -> str:
    """Returns the p95 latencies of requests of 1 and of 64 images."""
    of_one, of_many = (row["latencies"][count]["p95"] for count in ("1", "64"))
    return f"{of_one:.2f} and {of_many:.1f}"


def _refusals(row: Mapping[str, Any]) -> str:
    return f"{row['refused']:.2%}"
