"""Measures the service over HTTP on loopback: `python -m scripts.bench --quick`, or with one of these modes.

closed        1 to 64 clients that send the next request when the last is answered, alone and with disturbances
open          requests at random times, at shares of the measured capacity; latency counts from the planned time;
              compared with a simulation of the loop on the measured step times
alternatives  the same loads on other servers with the same weights, in one run
training      images per second of scripts.train, of a plain loop, and the limit set by the matrix rate
endurance     an hour of mixed load: fails if memory grows or an image changes
versions      throughput and latency of this version against another one, which is in the folder --base

Figures are medians with their range over the repeats; with twelve or more repeats, with their quartiles. Each start of
a service is measured --turns times, and only the measured service runs. The raw results are written to a JSON file,
with the machine and its matrix rate. UNFOG_* variables are passed to the service.
"""

import argparse
import asyncio
import json
import statistics
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import SHIPPED, load, write_atomically
from model.compiled.memory import keep_freed_memory
from model.unet import UNet
from scripts.benchmark.alternatives.painter import Painter
from scripts.benchmark.contestants import BenchError, Contestant, Running, alternative, started, this_service
from scripts.benchmark.endurance import MOST_GROWTH, complaint, endure
from scripts.benchmark.load import arrivals
from scripts.benchmark.loads import (
    Load,
    clients_of_one,
    closed_loads,
    large,
    mixed,
    one,
    one_large,
    open_loads,
    version_loads,
)
from scripts.benchmark.machine import matrix_rate, this_machine
from scripts.benchmark.report import COLUMNS, table_of, without_empty
from scripts.benchmark.runs import Times, measure
from scripts.benchmark.simulation import predicted_p95, simulate, simulate_batches, slowness, step_times
from scripts.benchmark.step_time import flop_of
from scripts.benchmark.training import CONTESTANTS, PASSES, TRAINING_COLUMNS, images_a_second, training_table
from scripts.benchmark.turns import take_turns
from scripts.benchmark.versions import BASE, NEW, compare_versions, version, versions_table
from scripts.benchmark.versions import COLUMNS as VERSION_COLUMNS
from scripts.common.arguments import Parser, integer, positive
from scripts.common.errors import ScriptError
from scripts.common.files import write_json
from scripts.common.mnist import load_mnist
from scripts.common.progress import Reporter, fail, require_installed
from scripts.evaluation.tables import as_table
from scripts.training.recipe import load_recipe

LITSERVE = (("--batch-timeout", "0.01"), ("--batch-timeout", "0.1"))
DIFFUSERS = ("diffusers", "diffusers-tuned", "diffusers-compiled")
MODES = ("closed", "open", "alternatives", "training", "endurance", "versions")
CLIENTS = (1, 4, 16, 64)
REQUESTS = ("small", "random", "large")  # of one image; at random times beside LitServe alone; of as many as may be
SATURATING = 64  # clients of one image
NUM_STEPS = 100
STEP_ROWS = (1, 2, 4, 8, 16, 32, 64)
SHARES = (0.2, 0.5, 0.7, 0.9, 1.2, 1.5)
OBJECTIVE = 5.0  # seconds
QUICK_SECONDS, QUICK_CLIENTS = 3, 8
QUICK_COLUMNS = ("load", "images a second", "p50, s", "requests")


def main(argv: list[str] | None = None) -> None:
    """Parses the arguments, measures and prints the table."""
    args = _parse(argv)
    require_installed(*packages_of(args), extra="bench")
    try:
        with Reporter() as reporter:
            runs = {
                None: bench_quick,
                "training": bench_training,
                "endurance": bench_endurance,
                "versions": bench_versions,
            }
            runs.get(args.mode, lambda args, reporter: Bench(args, reporter).run())(args, reporter)
    except (BenchError, ScriptError, OSError) as error:
        raise fail(f"bench: {error}") from error


def packages_of(args: argparse.Namespace) -> tuple[str, ...]:
    """Returns the packages of the extra that this run needs."""
    if args.mode == "training":
        return ()
    if args.mode != "alternatives":
        return ("aiohttp",)
    return ("aiohttp", "litserve", *(("diffusers",) if args.requests == "large" else ()))


class Bench:
    """One run: the machine's rate, the measurements, the table."""

    def __init__(self, args: argparse.Namespace, reporter: Reporter) -> None:
        self._args, self._reporter = args, reporter
        self._times = Times(args.seconds, args.settle, args.objective)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._own = this_service()
        self._at_batches = [this_service(f"unfog, {rows} rows", max_batch=str(rows)) for rows in args.max_batch]
        self._steps_of: Callable[[Sequence[int]], dict[int, float]] | None = None  # set where a prediction is made
        self._flop = flop_of(load(SHIPPED).network)
        self._rows: list[dict[str, Any]] = []
        self._content: dict[str, Any] = {}
        self._raw: list[list[Any]] = []

    def run(self) -> None:
        """The mode that was asked for; the table is printed and the JSON written."""
        facts = {**this_machine().as_json(), "flop_a_call": self._flop}
        self._reporter.line(", ".join(f"{name}: {value}" for name, value in facts.items()))
        self._content = {"machine": facts, "seconds": asdict(self._times), "rows": self._rows}
        keep_freed_memory()  # as the services do: steps are timed here too
        {"closed": self._closed, "open": self._open, "alternatives": self._alternatives}[self._args.mode]()
        rate = facts["matrix_rate"] = max(look["matrix_rate"] for row in self._rows for look in row["beside"])
        self._reporter.line(f"matrix rate: {rate / 1e9:.0f} GFLOP/s")
        for row in self._rows:
            if row["is_plain"]:
                done = row["images_a_second"] * NUM_STEPS * self._flop  # floating point operations a second
                row["matrix_share"] = done / rate
                row["matrix_share_beside"] = done / statistics.mean(look["matrix_rate"] for look in row["beside"])
        self._reporter.line(as_table(*without_empty(COLUMNS, table_of(self._rows))))
        self._write()

    def _closed(self) -> None:
        self._repeat([self._own, *self._at_batches], closed_loads(self._args.clients))

    def _open(self) -> None:
        saturated = self._repeat([self._own], [clients_of_one(SATURATING)])
        capacity = statistics.median(row["images_a_second"] for row in saturated)
        self._steps_of = Painter().measure_steps
        self._repeat([self._own], open_loads(capacity, self._args.shares))

    def _alternatives(self) -> None:
        own, litserve = [self._own, *self._at_batches], [alternative("litserve", *options) for options in LITSERVE]
        if self._args.requests == "large":
            self._repeat([*own, *litserve, *map(alternative, DIFFUSERS)], [large()])
            return
        if self._args.requests == "random":
            others, too_slow = litserve[:1], list[Contestant]()  # the setting whose requests wait less
        else:
            others, too_slow = [alternative("batched"), *litserve], [alternative("locked")]
        rows = self._repeat([*own, *too_slow, *others], [clients_of_one(SATURATING)])
        of_litserve = max(self._median(rows, tuned.name) for tuned in litserve if tuned in others)
        rate = 0.7 * min(self._median(rows, self._own.name), of_litserve)
        poisson = [Load("0.7 of the slower's capacity", asks=one, rate=rate)]
        if self._args.requests == "small":
            poisson.append(Load("the same, every other of 10 steps", asks=mixed, rate=rate))
        self._repeat([*own, *others], poisson)

    def _repeat(self, contestants: Sequence[Contestant], loads: Sequence[Load]) -> list[dict[str, Any]]:
        """Fresh starts; the contestants take turns, so that what else the machine does meets all alike."""
        rows = []
        turns = self._args.turns
        for first in range(0, self._args.repeats * turns, turns):
            for row in take_turns(contestants, loads, self._times, range(first, first + turns), self._look):
                if self._steps_of:
                    row |= self._predicted(row)
                found = f"{row['images_a_second']:.2f} images/s"
                self._reporter.line(f"{row['repeat'] + 1}: {row['contestant']}, {row['load']}: {found}")
                raw = row.pop("answers"), row.pop("moments")
                self._raw.append([row["contestant"], row["load"], row["repeat"], *raw])
                rows.append(row)
                self._rows.append(row)
                self._write()
        return rows

    def _write(self) -> None:
        """What was measured so far is not lost with what comes; each answer goes into a file of its own."""
        write_json(self._args.out, self._content)
        write_atomically(self._args.out.with_suffix(".answers.json"), json.dumps(self._raw).encode())

    def _look(self) -> dict[str, Any]:
        """The machine while no service runs."""
        steps = {"seconds_by_rows": self._steps_of(STEP_ROWS)} if self._steps_of else {}
        return {"matrix_rate": matrix_rate(self._device), **steps}

    def _predicted(self, row: dict[str, Any]) -> dict[str, float]:
        """p95 for the same arrivals if the steps were all that takes time: bare ones, the service's own, in batches."""
        looks = [look["seconds_by_rows"] for look in row["beside"]]
        bare = step_times({rows: statistics.mean(look[rows] for look in looks) for rows in STEP_ROWS})
        if len(row["moments"]) < 2:
            raise BenchError("the service's metrics could not be read under load")
        own = slowness(row["moments"], bare)
        loops = {
            "predicted_p95": (simulate, lambda at: 1.0),
            "replayed_p95": (simulate, own),
            "batched_p95": (simulate_batches, own),
        }
        opens, ends = self._times.settle, self._times.settle + self._times.window
        steps = NUM_STEPS, STEP_ROWS[-1], bare
        return {
            name: predicted_p95(loop(arrivals(row["rate"], row["repeat"]), ends, *steps, pace), opens)
            for name, (loop, pace) in loops.items()
        }

    def _median(self, rows: Sequence[dict[str, Any]], contestant: str) -> float:
        return statistics.median(row["images_a_second"] for row in rows if row["contestant"] == contestant)


def bench_quick(args: argparse.Namespace, reporter: Reporter) -> None:
    """Measures a few loads for a few seconds each on one start of the service, and prints a small table."""
    machine, own = this_machine(), this_service()
    reporter.line(f"{machine.processor}, {machine.cores} cores, torch {machine.torch}")
    reporter.line("Starting the service. Its first start on a machine may compile for 30 to 60 s.")
    lines, times = list[list[str]](), Times(QUICK_SECONDS, 0, OBJECTIVE)
    with started(own) as running:
        reporter.line(_arithmetic_of(running))
        for load in (clients_of_one(1), clients_of_one(QUICK_CLIENTS), one_large()):
            found = measure(running, own, load, times, seed=0)
            ((_, latency),) = found["latencies"].items()
            lines.append([load.name, f"{found['images_a_second']:.3g}", f"{latency['p50']:.3g}", f"{latency['count']}"])
    reporter.line(as_table(QUICK_COLUMNS, lines))
    reporter.line(
        f"One start, windows of {QUICK_SECONDS} s, {NUM_STEPS} steps, no guidance: a first impression, not comparable "
        "with the published figures. Use the mode closed for those."
    )


def _arithmetic_of(running: Running) -> str:
    with urllib.request.urlopen(f"{running.url}/health", timeout=10) as answer:
        health = json.load(answer)
    compiled = "compiled" if health["compiled"] else "not compiled"
    return f"unfog {health['version']} on {health['device']}, {health['dtype']}, {compiled}"


def bench_training(args: argparse.Namespace, reporter: Reporter) -> None:
    """The contestants take turns; the limit is the matrix rate over the arithmetic of an image."""
    recipe, device = load_recipe(args.preset), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, labels = load_mnist("train", args.data_dir)
    keep_freed_memory()  # as scripts.train does
    limit = matrix_rate(device) / (PASSES * flop_of(UNet(recipe.unet)))
    rates: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for repeat in range(args.repeats):
        for name, found in rates.items():
            found.append(images_a_second(name, recipe, images, labels, device, args.steps))
            reporter.line(f"{repeat + 1}: {name}: {found[-1]:.1f} images/s")
    reporter.line(as_table(TRAINING_COLUMNS, training_table(rates, limit)))
    write_json(args.out, {"machine": this_machine().as_json(), "limit": limit, "images_a_second": rates})


def bench_endurance(args: argparse.Namespace, reporter: Reporter) -> None:
    """One start, `--minutes` of load; BenchError where a picture changed or what the process holds grew."""
    with started(this_service()) as running:
        log = asyncio.run(endure(running, 60 * args.minutes, reporter))
    found = {"machine": this_machine().as_json(), "minutes": args.minutes, **log.as_json()}
    write_json(args.out, found)
    answers = ", ".join(f"{count} x {status or 'left'}" for status, count in sorted(log.answers.items()))
    grown = ", ".join(f"{found[f'{name}_an_hour']:.2f} {name}" for name in MOST_GROWTH)
    reporter.line(f"{answers}; growth in the second half, an hour: {grown}")
    if wrong := complaint(found):
        raise BenchError(wrong)


def bench_versions(args: argparse.Namespace, reporter: Reporter) -> None:
    """Compares this version with the one in `args.base`, both under the same loads in short turns."""
    if not (args.base / "app").is_dir():
        raise BenchError(f"{args.base} holds no version of the service: it has no folder app")
    rows = list[dict[str, Any]]()

    def report(row: dict[str, Any]) -> None:
        rows.append(row)
        reporter.line(f"{row['load']}, pair {row['pair'] + 1}: {row[NEW] / row[BASE]:.3f}")
        write_json(args.out, {"machine": this_machine().as_json(), "seconds_in_a_pair": args.seconds, "rows": rows})

    base, new = version(BASE, args.base), version(NEW, Path.cwd())
    compare_versions(base, new, version_loads(), args.pairs, args.seconds, report)
    reporter.line(as_table(VERSION_COLUMNS, versions_table(rows)))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m scripts.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"first numbers in under a minute: one start, then 1 client, {QUICK_CLIENTS} clients and a request of 64 "
        "images for a few seconds each; not comparable with the published figures",
    )
    commands = parser.add_subparsers(metavar="|".join(MODES), dest="mode")
    for mode in MODES:
        _add_mode(commands.add_parser(mode), mode)
    args = parser.parse_args(argv)
    if args.quick == bool(args.mode):
        parser.error(f"choose either --quick or a mode: {', '.join(MODES)}")
    return args


def _add_mode(command: argparse.ArgumentParser, mode: str) -> None:
    command.add_argument("--out", type=Path, required=True, help="the .json file for the raw results")
    if mode == "endurance":
        command.add_argument("--minutes", type=positive, default=60.0, help="duration of the load; default: 60")
        return
    if mode == "versions":
        command.add_argument("--base", type=Path, required=True, help="folder of the other version, such as a worktree")
        command.add_argument("--pairs", type=integer(1, 100), default=5, help="pairs of each load; default: 5")
        command.add_argument(
            "--seconds", type=positive, default=24.0, help="seconds for each version in a pair; default: 24"
        )
        return
    command.add_argument(
        "--repeats", type=integer(1, 100), default=5, help="fresh starts, each measured --turns times; default: 5"
    )
    if mode == "training":
        command.add_argument("--preset", default="default", help="the recipe; default: default")
        command.add_argument("--steps", type=integer(1, 100_000), default=30, help="steps per repeat; default: 30")
        command.add_argument(
            "--data-dir", type=Path, default=Path("data"), help="folder of MNIST's IDX files; downloaded if missing"
        )
        return
    command.add_argument("--seconds", type=integer(1, 86_400), default=20, help="length of a window; default: 20")
    command.add_argument(
        "--turns", type=integer(1, 1000), default=1, help="measurements per start, each its own repeat; default: 1"
    )
    command.add_argument(
        "--settle", type=integer(0, 86_400), default=8, help="seconds under load before a window opens; default: 8"
    )
    command.add_argument(
        "--objective", type=positive, default=OBJECTIVE, help="seconds within which an answer is in time; default: 5"
    )
    command.add_argument(
        "--max-batch", type=integer(1, 4096), nargs="*", default=[], help="also measure with these batch sizes"
    )
    if mode == "closed":
        clients = " ".join(map(str, CLIENTS))
        command.add_argument(
            "--clients",
            type=integer(1, 1024),
            nargs="+",
            default=CLIENTS,
            help=f"numbers of clients; default: {clients}",
        )
    if mode == "alternatives":
        command.add_argument(
            "--requests", choices=REQUESTS, default=REQUESTS[0], help=f"the load; default: {REQUESTS[0]}"
        )
    if mode == "open":
        shares = " ".join(map(str, SHARES))
        command.add_argument(
            "--shares", type=positive, nargs="+", default=SHARES, help=f"shares of the capacity; default: {shares}"
        )


if __name__ == "__main__":
    main()
