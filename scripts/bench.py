"""Measures the service over HTTP on loopback: `python -m scripts.bench closed --out bench.json`.

closed        clients that ask again as soon as they are answered, 1 to 64 of them, alone and disturbed
open          requests at random times, at shares of the capacity, latency counted from when each was due,
              beside what a simulation of the loop on the measured step times says
alternatives  the same beside what a user would pick instead, of the same weights, in one run
training      images a second of scripts.train beside a plain loop's and what the matrix rate would allow
endurance     load of every kind for an hour: whether memory grows, and whether a picture changes

Each figure is a median with its range over the repeats, from twelve on with their quartiles. Services start anew for
every --turns of them, and only the one that is measured runs. Raw results go into the JSON file, with the machine and
the rate at which it multiplies matrices. UNFOG_* variables reach the service.
"""

import argparse
import asyncio
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import SHIPPED, load, write_atomically
from model.memory import keep_freed_memory
from model.unet import UNet
from scripts.arguments import Parser, integer, positive
from scripts.benchmark.alternatives.painter import Painter
from scripts.benchmark.contestants import BenchError, Contestant, alternative, started, this_service
from scripts.benchmark.endurance import MOST_GROWTH, complaint, endure
from scripts.benchmark.load import arrivals
from scripts.benchmark.loads import Load, clients_of_one, closed_loads, large, mixed, one, open_loads
from scripts.benchmark.machine import matrix_rate, this_machine
from scripts.benchmark.report import COLUMNS, table_of, without_empty
from scripts.benchmark.runs import Times
from scripts.benchmark.simulation import predicted_p95, simulate, simulate_batches, slowness, step_times
from scripts.benchmark.training import CONTESTANTS, PASSES, TRAINING_COLUMNS, images_a_second, training_table
from scripts.benchmark.turns import take_turns
from scripts.evaluation.tables import as_table
from scripts.files import write_json
from scripts.mnist import DataError, load_mnist
from scripts.progress import Reporter, fail
from scripts.recipe import RecipeError, load_recipe
from scripts.step_time import flop_of

LITSERVE = (("--batch-timeout", "0.01"), ("--batch-timeout", "0.1"))
DIFFUSERS = ("diffusers", "diffusers-tuned", "diffusers-compiled")
MODES = ("closed", "open", "alternatives", "training", "endurance")
CLIENTS = (1, 4, 16, 64)
REQUESTS = ("small", "random", "large")  # of one image; at random times beside LitServe alone; of as many as may be
SATURATING = 64  # clients of one image
NUM_STEPS = 100
STEP_ROWS = (1, 2, 4, 8, 16, 32, 64)
SHARES = (0.2, 0.5, 0.7, 0.9, 1.2, 1.5)


def main(argv: list[str] | None = None) -> None:
    """Parses the arguments, measures, prints the table."""
    args = _parse(argv)
    try:
        with Reporter() as reporter:
            runs = {"training": bench_training, "endurance": bench_endurance}
            runs.get(args.mode, lambda args, reporter: Bench(args, reporter).run())(args, reporter)
    except (BenchError, DataError, RecipeError, OSError) as error:
        raise fail(f"bench: {error}") from error


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


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m scripts.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="|".join(MODES), dest="mode")
    for mode in MODES:
        command = commands.add_parser(mode)
        command.add_argument("--out", type=Path, required=True, help="a .json for the raw results")
        if mode == "endurance":
            command.add_argument("--minutes", type=positive, default=60.0, help="default: 60")
            continue
        command.add_argument(
            "--repeats", type=integer(1, 100), default=5, help="fresh starts, of --turns each; default: 5"
        )
        if mode == "training":
            command.add_argument("--preset", default="default", help="default: default")
            command.add_argument("--steps", type=integer(1, 100_000), default=30, help="of each repeat; default: 30")
            command.add_argument("--data-dir", type=Path, default=Path("data"), help="IDX files; downloaded if missing")
            continue
        command.add_argument("--seconds", type=integer(1, 86_400), default=20, help="of each window; default: 20")
        command.add_argument(
            "--turns", type=integer(1, 1000), default=1, help="a start, each a repeat of its own; default: 1"
        )
        command.add_argument(
            "--settle", type=integer(0, 86_400), default=8, help="seconds under load before a window opens; default: 8"
        )
        command.add_argument(
            "--objective", type=positive, default=5.0, help="seconds within which an answer is in time; default: 5"
        )
        command.add_argument("--max-batch", type=integer(1, 4096), nargs="*", default=[], help="also at these batches")
        if mode == "closed":
            command.add_argument("--clients", type=integer(1, 1024), nargs="+", default=CLIENTS)
        if mode == "alternatives":
            command.add_argument("--requests", choices=REQUESTS, default=REQUESTS[0], help=f"default: {REQUESTS[0]}")
        if mode == "open":
            command.add_argument("--shares", type=positive, nargs="+", default=SHARES)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
