"""The modes of scripts.bench that measure the service over HTTP and compare it with its alternatives."""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from model.checkpoint import load
from model.compiled.memory import keep_freed_memory
from model.files import write_atomically, write_json
from model.spec import SHIPPED
from scripts.benchmark.alternatives.painter import Painter
from scripts.benchmark.http_client import fetch
from scripts.benchmark.loads import (
    NUM_STEPS,
    PIPELINE_PROBE,
    Load,
    clients_of_one,
    closed_loads,
    large,
    mixed,
    mixed_of_pipeline,
    of_pipeline,
    one,
    one_large,
    open_loads,
    published_loads,
)
from scripts.benchmark.machine import matrix_rate, this_device, this_machine
from scripts.benchmark.measurement import Times, measure, take_turns
from scripts.benchmark.report import COLUMNS, table_of, without_empty
from scripts.benchmark.services import Contestant, Running, alternative, started, this_service
from scripts.benchmark.simulation import STEP_ROWS, predictions
from scripts.benchmark.step_time import flop_of
from scripts.common.progress import Reporter
from scripts.evaluation.tables import as_table

LITSERVE = (("--batch-timeout", "0.01"), ("--batch-timeout", "0.1"))
DIFFUSERS = ("diffusers", "diffusers-tuned", "diffusers-compiled")
REQUESTS = ("small", "large")  # sizes of the requests in the mode alternatives
SATURATING = 64  # number of clients that use the full capacity of a service
OBJECTIVE = 5.0  # latency limit in seconds
QUICK_SECONDS, QUICK_CLIENTS = 3, 8
QUICK_COLUMNS = ("load", "images/s", "p50, s", "requests")
Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a mode: how often and how long it measures, and where it writes its results."""

    out: Path
    times: Times
    repeats: int  # number of times that all services are started
    turns: int  # number of measurements of each load per start
    max_batch: Sequence[int]  # further values of UNFOG_MAX_BATCH to measure

    @property
    def own(self) -> list[Contestant]:
        """Returns this service with its default settings, and with each value of `max_batch`."""
        others = [this_service(f"unfog, {rows} rows", max_batch=str(rows)) for rows in self.max_batch]
        return [this_service(), *others]


def measure_closed(options: Options, clients: Sequence[int], reporter: Reporter) -> None:
    """Measures this service in closed loops. `clients` has the numbers of clients that request one image at a time."""
    run = _Run(options, reporter)
    run.repeat(options.own, closed_loads(clients))
    run.finish()


def measure_models(options: Options, reporter: Reporter) -> None:
    """Measures the latency of one image on an idle service, with each evaluated setting."""
    run = _Run(options, reporter)
    run.repeat(options.own[:1], published_loads())
    run.finish()


def measure_open(options: Options, shares: Sequence[float], reporter: Reporter) -> None:
    """Measures this service with Poisson arrivals at fractions of its capacity, and simulates the same arrivals."""
    run, own = _Run(options, reporter), options.own[:1]
    saturated = run.repeat(own, [clients_of_one(SATURATING)])
    run.repeat(own, open_loads(_rate_of(saturated, own[0].name), shares), Painter().measure_steps)
    run.finish()


def measure_alternatives(options: Options, requests: str, reporter: Reporter) -> None:
    """Measures this service and the alternatives. `requests` is one of REQUESTS and selects the loads."""
    run, own = _Run(options, reporter), options.own
    litserve = [alternative("litserve", *arguments) for arguments in LITSERVE]
    if requests == "large":
        run.repeat([*own, *litserve, *map(alternative, DIFFUSERS)], [large()])
    else:
        others, too_slow = [alternative("batched"), *litserve], [alternative("locked")]
        saturated = run.repeat([*own, *too_slow, *others], [clients_of_one(SATURATING)])
        of_litserve = max(_rate_of(saturated, tuned.name) for tuned in litserve)
        rate = 0.7 * min(_rate_of(saturated, own[0].name), of_litserve)
        poisson = [
            Load("70% of the slower service's capacity", make_request=one, rate=rate),
            Load("70% of the slower service's capacity, half with 10 steps", make_request=mixed, rate=rate),
        ]
        run.repeat([*own, *others], poisson)
    run.finish()


def measure_pipeline(options: Options, folder: Path, reporter: Reporter) -> None:
    """Measures this service and other servers with the same pipeline of diffusers.

    In the first load, one client sends requests with 1 step, and 12 clients use the full capacity with requests of 50
    steps. In the second one, requests arrive at random, half of them with 1 step, at 90% of the capacity of the slowest
    service.
    """
    run, probe = _Run(options, reporter), PIPELINE_PROBE
    own = this_service(probe=probe, models=f"own={folder.resolve()}")
    names = (("pipeline-example",), ("pipeline-litserve", "--max-images", "8"))
    others = [(" ".join(name), alternative(*name, "--folder", str(folder), probe=probe)) for name in names]
    contestants = [own, *(replace(other, name=name) for name, other in others)]
    count, long = 12, of_pipeline(50)
    name = f"one client with 1-step requests, {count} clients with 50-step requests"
    saturating = Load(name, (of_pipeline(1), *(long,) * count))
    found = run.repeat(contestants, [saturating])
    slowest = max(row["latencies"][long(0).kind]["p50"] for row in found)
    # An arrival has 25.5 steps on average.
    rate = 0.9 * count / slowest * 50 / 25.5
    arriving = Load("arrivals, half with 1 step and half with 50", make_request=mixed_of_pipeline, rate=rate)
    run.repeat(contestants, [arriving])
    run.finish()


def measure_quick(reporter: Reporter) -> None:
    """Measures a few loads for a few seconds each on one start of the service, and prints a small table."""
    machine, own = this_machine(), this_service()
    reporter.line(f"{machine.processor}, {machine.cores} cores, torch {machine.torch}")
    reporter.line("Starting the service. The first start on a machine may compile for 30 to 60 s.")
    lines, times = list[list[str]](), Times(QUICK_SECONDS, 0, OBJECTIVE)
    with started(own) as running:
        reporter.line(_arithmetic_of(running))
        for under in (clients_of_one(1), clients_of_one(QUICK_CLIENTS), one_large()):
            found = measure(running, own, under, times, seed=0)
            ((_, latency),) = found["latencies"].items()
            lines.append(
                [under.name, f"{found['images_a_second']:.3g}", f"{latency['p50']:.3g}", f"{latency['count']}"]
            )
    reporter.line(as_table(QUICK_COLUMNS, lines))
    reporter.line(
        f"One start, {QUICK_SECONDS} s per load, {NUM_STEPS} steps, no guidance. These figures are a first impression "
        "and not comparable with the published figures. For comparable figures use the mode closed."
    )


def _arithmetic_of(running: Running) -> str:
    health = json.loads(fetch(f"{running.url}/health"))
    compiled = "compiled" if health["compiled"] else "not compiled"
    return f"unfog {health['version']} on {health['device']}, {health['dtype']}, {compiled}"


class _Run:
    """The measurements of one mode. The JSON file is written again after each measurement."""

    def __init__(self, options: Options, reporter: Reporter) -> None:
        self._options, self._reporter, self._device = options, reporter, this_device()
        self._flop = flop_of(load(SHIPPED).network)
        self._rows, self._raw = Rows(), list[list[Any]]()
        self._machine = {**this_machine().as_json(), "flop_a_call": self._flop}
        reporter.line(", ".join(f"{name}: {value}" for name, value in self._machine.items()))
        keep_freed_memory()  # the services also do this, and this process measures step times

    def repeat(
        self,
        contestants: Sequence[Contestant],
        loads: Sequence[Load],
        measure_steps: Callable[[Sequence[int]], dict[int, float]] | None = None,
    ) -> Rows:
        """Measures each service under each load, with fresh starts, and returns the rows.

        The services take turns, so that changes of the machine's speed affect all of them. `measure_steps` returns the
        seconds per step for each number of rows. If it is given, the rows have predictions of the latency.
        """
        times, rows, turns = self._options.times, Rows(), self._options.turns

        def measure_machine() -> dict[str, Any]:
            steps = {"seconds_by_rows": measure_steps(STEP_ROWS)} if measure_steps else {}
            return {"matrix_rate": matrix_rate(self._device), **steps}

        for first in range(0, self._options.repeats * turns, turns):
            for row in take_turns(contestants, loads, times, range(first, first + turns), measure_machine):
                if measure_steps:
                    row |= predictions(row, times.settle, times.settle + times.window)
                found = f"{row['images_a_second']:.2f} images/s"
                self._reporter.line(f"{row['repeat'] + 1}: {row['contestant']}, {row['load']}: {found}")
                raw = row.pop("answers"), row.pop("moments")
                self._raw.append([row["contestant"], row["load"], row["repeat"], *raw])
                rows.append(row)
                self._rows.append(row)
                self._write()
        return rows

    def finish(self) -> None:
        """Adds the fractions of the matrix rate to the rows, prints the table and writes the results."""
        rate = self._machine["matrix_rate"] = max(
            around["matrix_rate"] for row in self._rows for around in row["adjacent"]
        )
        self._reporter.line(f"Matrix rate: {rate / 1e9:.0f} GFLOP/s")
        for row in self._rows:
            if row["is_plain"]:
                done = row["images_a_second"] * NUM_STEPS * self._flop  # floating point operations per second
                row["matrix_share"] = done / rate
                row["adjacent_matrix_share"] = done / statistics.mean(
                    around["matrix_rate"] for around in row["adjacent"]
                )
        self._reporter.line(as_table(*without_empty(COLUMNS, table_of(self._rows))))
        self._write()

    def _write(self) -> None:
        """Writes the rows so far. The times of the single requests are in a second file, `*.answers.json`."""
        out = self._options.out
        write_json(out, {"machine": self._machine, "seconds": asdict(self._options.times), "rows": self._rows})
        write_atomically(out.with_suffix(".answers.json"), json.dumps(self._raw).encode())


def _rate_of(rows: Rows, contestant: str) -> float:
    """Returns the median throughput of a service in images per second."""
    return statistics.median(row["images_a_second"] for row in rows if row["contestant"] == contestant)
