"""Measures the service over HTTP on loopback: `python -m scripts.bench closed --out bench.json`.

closed        clients that ask again as soon as they are answered, 1 to 64 of them
open          requests at random times, at shares of the capacity, latency counted from when each was due
alternatives  the same beside what a user would pick instead, of the same weights, in one run

Each figure is a median with its range over the repeats; every repeat starts the service anew. Raw results go into
the JSON file, with the machine and the rate at which it multiplies matrices. UNFOG_* variables reach the service.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import SHIPPED, load
from scripts.arguments import Parser, integer
from scripts.benchmark.contestants import BenchError, Contestant, alternative, this_service
from scripts.benchmark.load import Ask
from scripts.benchmark.machine import matrix_rate, this_machine
from scripts.benchmark.report import with_spread
from scripts.benchmark.runs import Asks, Load, measure
from scripts.evaluation.tables import as_table
from scripts.files import write_json
from scripts.progress import Reporter, fail
from scripts.step_time import flop_of

CLIENTS = (1, 4, 16, 64)
SHARES = (0.2, 0.5, 0.7, 0.9, 1.2, 1.5)
LARGEST_REQUEST = 64
UNGUIDED: dict[str, Any] = {"digit": 7, "guidance_scale": 1}
FEW_STEPS = {"num_steps": 10, "sampler": "ddim"}
COLUMNS = (
    "contestant",
    "load",
    "images a second",
    "p50, s",
    "p95, s",
    "p99, s",
    "rows a step",
    "ready after, s",
    "memory, MB",
)


def main(argv: list[str] | None = None) -> None:
    """Parses the arguments, measures, prints the table."""
    args = _parse(argv)
    try:
        with Reporter() as reporter:
            args.run(args, reporter)
    except (BenchError, OSError) as error:
        raise fail(f"bench: {error}") from error


def one(k: int) -> Ask:
    """One image in 100 steps."""
    return Ask("one", {**UNGUIDED, "digit": k % 10, "seed": k})


def many(k: int) -> Ask:
    """The largest request."""
    return Ask("64", {**one(k).body, "count": LARGEST_REQUEST})


def guided(asks: Asks) -> Asks:
    """The same with the guidance that the checkpoint recommends."""

    def ask(k: int) -> Ask:
        asked = asks(k)
        return Ask(asked.kind, {name: value for name, value in asked.body.items() if name != "guidance_scale"})

    return ask


def mixed(k: int) -> Ask:
    """Every other request is one of ten steps."""
    return Ask("10 steps", {**one(k).body, **FEW_STEPS}) if k % 2 else Ask("100 steps", one(k).body)


def closed_loads(clients: Sequence[int], seconds: float) -> list[Load]:
    """One image a request by ever more clients, then two that ask for the most; then guided."""
    of_one = [Load(f"clients: {count}", one, seconds, clients=count) for count in clients]
    alike = {"clients: 1, guided": (guided(one), 1), "clients: 2, of 64 images, guided": (guided(many), 2)}
    of_guided = [Load(name, asks, seconds, clients=count) for name, (asks, count) in alike.items()]
    return [*of_one, Load("clients: 2, of 64 images", many, seconds, clients=2), *of_guided]


def open_loads(capacity: float, shares: Sequence[float], seconds: float) -> list[Load]:
    """Poisson arrivals of one image each, at shares of so many images a second."""
    return [Load(f"{share:g} of capacity", one, seconds, rate=share * capacity) for share in shares]


def _closed(args: argparse.Namespace, reporter: Reporter) -> None:
    rows = _repeat(args, [this_service(), *_at_batches(args)], closed_loads(args.clients, args.seconds), reporter)
    _finish(args, rows, reporter)


def _open(args: argparse.Namespace, reporter: Reporter) -> None:
    rows = _repeat(args, [this_service()], [_saturated(args)], reporter)
    capacity = statistics.median(row["images_a_second"] for row in rows)
    rows += _repeat(args, [this_service()], open_loads(capacity, args.shares, args.seconds), reporter)
    _finish(args, rows, reporter)


def _alternatives(args: argparse.Namespace, reporter: Reporter) -> None:
    own, best = this_service(), [*_at_batches(args)]
    others = [alternative("locked"), alternative("batched"), alternative("litserve")]
    pipelines = [alternative("diffusers"), alternative("diffusers-tuned")]
    rows = _repeat(args, [own, *best, *others], [_saturated(args)], reporter)
    slowest = min(row["images_a_second"] for row in rows if row["contestant"] in ("unfog", "litserve"))
    poisson = Load("0.7 of the slower's capacity", one, args.seconds, rate=0.7 * slowest)
    mix = Load("the same, every other of 10 steps", mixed, args.seconds, rate=0.7 * slowest)
    rows += _repeat(args, [own, *others[1:]], [poisson, mix], reporter)
    large = Load("clients: 2, of 64 images", many, args.seconds, clients=2)
    rows += _repeat(args, [own, *best, *others, *pipelines], [large], reporter)
    _finish(args, rows, reporter)


def _saturated(args: argparse.Namespace) -> Load:
    return Load("clients: 64", one, args.seconds, clients=64)


def _at_batches(args: argparse.Namespace) -> list[Contestant]:
    return [this_service(f"unfog, {rows} rows", max_batch=str(rows)) for rows in args.max_batch]


def _repeat(
    args: argparse.Namespace, contestants: Sequence[Contestant], loads: Sequence[Load], reporter: Reporter
) -> list[dict[str, Any]]:
    """The contestants take turns, so that what else the machine does meets all alike."""
    rows = []
    for repeat in range(args.repeats):
        for contestant in contestants:
            for row in measure(contestant, loads, seed=repeat):
                reporter.line(f"{contestant.name}, {row['load']}: {row['images_a_second']:.2f} images/s")
                rows.append({"repeat": repeat, **row})
    return rows


def _finish(args: argparse.Namespace, rows: list[dict[str, Any]], reporter: Reporter) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = {**this_machine().as_json(), "matrix_rate": matrix_rate(device), "flop_a_call": _flop_a_call()}
    reporter.line(as_table(COLUMNS, table_of(rows)))
    write_json(args.out, {"machine": facts, "seconds": args.seconds, "rows": rows})


def _flop_a_call() -> int:
    return flop_of(load(SHIPPED).network)


def table_of(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A line for each contestant under each load, and for each kind of request in it."""
    lines = []
    for contestant, load_name in dict.fromkeys((row["contestant"], row["load"]) for row in rows):
        of_it = [row for row in rows if (row["contestant"], row["load"]) == (contestant, load_name)]
        for kind in of_it[0]["latencies"]:
            latencies = [row["latencies"][kind] for row in of_it]
            lines.append(
                [
                    contestant,
                    load_name if len(of_it[0]["latencies"]) == 1 else f"{load_name}: {kind}",
                    with_spread([row["images_a_second"] for row in of_it]),
                    *(with_spread([found[share] for found in latencies]) for share in ("p50", "p95", "p99")),
                    with_spread([row["rows_a_step"] for row in of_it if "rows_a_step" in row] or [float("nan")]),
                    with_spread([row["ready_seconds"] for row in of_it]),
                    with_spread([row["resident_megabytes"] for row in of_it]),
                ]
            )
    return lines


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m scripts.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="closed|open|alternatives")
    for name, run in (("closed", _closed), ("open", _open), ("alternatives", _alternatives)):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("--repeats", type=integer(1, 100), default=5, help="fresh starts; default: 5")
        command.add_argument("--seconds", type=integer(1, 86_400), default=20, help="of each window; default: 20")
        command.add_argument("--max-batch", type=integer(1, 4096), nargs="*", default=[], help="also at these batches")
        command.add_argument("--out", type=Path, required=True, help="a .json for the raw results")
        if name == "closed":
            command.add_argument("--clients", type=integer(1, 1024), nargs="+", default=CLIENTS)
        if name == "open":
            command.add_argument("--shares", type=float, nargs="+", default=SHARES)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
