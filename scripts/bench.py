"""Measures the service over HTTP on loopback: `python -m scripts.bench --quick`, or with one of these modes.

closed        closed loop: 1 to 64 clients, each sends its next request when the previous one is answered; also while
              another process uses a core, and while another client floods the service
open          open loop: requests at random times, at fractions of the measured capacity, compared with a simulation;
              latency counts from the planned time of a request
models        latency of one image on an idle service, with each setting in docs/results/final
alternatives  the same loads on this service and on other servers with the same weights
pipeline      a pipeline of diffusers on this service, on the server example of diffusers and on LitServe
training      images per second of scripts.train and of a plain training loop, and the limit set by the matrix rate
endurance     an hour of mixed load; fails if memory grows or if an image changes
memory        highest memory of the service under load, without and with CLIP
versions      throughput and latency of this version and of the version in the folder --base
batches       latency of requests while a batch runs, and the throughput of the batch
streams       throughput while every client streams previews, and while a viewer reads the batch events
host          host cost of the service: its work on the processor while the device computes; also compared with --base
replicas      two replicas behind HAProxy with requests at random times, compared with a simulation of the replicas
routing       simulation of more replicas behind different routers, with the step times that `replicas` has measured
scaling       machines, shared parts and cost for 10 to 100,000 images per second, computed from the results
profile       time of each kind of kernel in a reverse step, not compiled and compiled
page          write a page of tables from the JSON files of one machine

Figures are medians over the repeats with their range, or with their quartiles for twelve or more repeats. Each service
is started --repeats times and measured --turns times per start. While one service is measured, the others are
suspended. The raw results are written to a JSON file. UNFOG_* variables are passed to the service.
"""

import argparse
from pathlib import Path

from scripts.benchmark.batches import measure_batches
from scripts.benchmark.endurance import measure_endurance
from scripts.benchmark.host import measure_host
from scripts.benchmark.measurement import Times
from scripts.benchmark.memory import measure_memory
from scripts.benchmark.modes import (
    OBJECTIVE,
    QUICK_CLIENTS,
    REQUESTS,
    Options,
    measure_alternatives,
    measure_closed,
    measure_models,
    measure_open,
    measure_pipeline,
    measure_quick,
)
from scripts.benchmark.page import write_page
from scripts.benchmark.profile import measure_profile
from scripts.benchmark.replicas import measure_replicas
from scripts.benchmark.routing import measure_routing
from scripts.benchmark.scaling import print_scaling
from scripts.benchmark.streams import measure_streams
from scripts.benchmark.training import measure_training
from scripts.benchmark.versions import measure_versions
from scripts.common.arguments import Parser, file_to_write, integer, positive, setting
from scripts.common.errors import reports_errors
from scripts.common.progress import Reporter, require_installed

CLIENTS = (1, 4, 16, 64)
SHARES = (0.2, 0.5, 0.7, 0.9, 1.2, 1.5)
MODES = (
    "closed",
    "open",
    "models",
    "alternatives",
    "pipeline",
    "training",
    "endurance",
    "memory",
    "versions",
    "batches",
    "streams",
    "host",
    "replicas",
    "routing",
    "scaling",
    "profile",
    "page",
)


@reports_errors("bench")
def main(argv: list[str] | None = None) -> None:
    """Parses the arguments, measures and prints the table."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.quick == bool(args.mode):
        parser.error(f"give either --quick or one mode: {', '.join(MODES)}")
    require_installed(*_packages_of(args), extra="bench")
    with Reporter() as reporter:
        _run(args, reporter)


def _run(args: argparse.Namespace, reporter: Reporter) -> None:
    match args.mode:
        case "training":
            measure_training(args.preset, args.steps, args.repeats, args.data_dir, args.out, reporter)
        case "endurance":
            measure_endurance(args.minutes, args.out, reporter)
        case "memory":
            measure_memory(args.out, reporter)
        case "versions" | "batches" | "streams" | "host":
            _compare(args, reporter)
        case "replicas" | "routing" | "scaling":
            _scale(args, reporter)
        case "profile":
            measure_profile(args.rows, args.num_threads, args.out, reporter)
        case "page":
            write_page(args.folder, args.out, reporter)
        case None:
            measure_quick(reporter)
        case _:
            _measure_loads(args, reporter)


def _compare(args: argparse.Namespace, reporter: Reporter) -> None:
    match args.mode:
        case "versions":
            measure_versions(args.base, dict(args.setting), args.pairs, args.seconds, args.out, reporter)
        case "batches":
            measure_batches(args.repeats, args.seconds, args.out, reporter)
        case "streams":
            measure_streams(args.pairs, args.seconds, args.out, reporter)
        case "host":
            measure_host(args.base, args.repeats, args.seconds, args.out, reporter)


def _scale(args: argparse.Namespace, reporter: Reporter) -> None:
    match args.mode:
        case "replicas":
            measure_replicas(args.repeats, args.seconds, args.loop_seconds, args.out, reporter)
        case "routing":
            measure_routing(args.measured, args.requests, args.out, reporter)
        case "scaling":
            print_scaling(args.folder, reporter)


def _measure_loads(args: argparse.Namespace, reporter: Reporter) -> None:
    match args.mode:
        case "closed":
            measure_closed(_options(args), args.clients, reporter)
        case "open":
            measure_open(_options(args), args.shares, reporter)
        case "models":
            measure_models(_options(args), reporter)
        case "alternatives":
            measure_alternatives(_options(args), args.requests, reporter)
        case "pipeline":
            measure_pipeline(_options(args), args.folder, reporter)


def _options(args: argparse.Namespace) -> Options:
    times = Times(args.seconds, args.settle, args.objective)
    return Options(args.out, times, args.repeats, args.turns, args.max_batch)


def _packages_of(args: argparse.Namespace) -> tuple[str, ...]:
    """Returns the packages of the extra `bench` that the mode needs."""
    match args.mode:
        case "training" | "profile" | "page" | "routing" | "scaling":
            return ()
        case "endurance":
            return ("psutil", "scipy")
        case "alternatives":
            return ("psutil", "litserve", *(["diffusers"] if args.requests == "large" else []))
        case "pipeline":
            return ("psutil", "litserve", "diffusers")
    return ("psutil",)


def build_parser() -> Parser:
    parser = Parser(
        prog="python -m scripts.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"first figures in less than a minute: one start, then 1 client, {QUICK_CLIENTS} clients and requests of "
        "64 images for a few seconds each; not comparable with the published figures",
    )
    commands = parser.add_subparsers(metavar="|".join(MODES), dest="mode")
    added = {mode: commands.add_parser(mode) for mode in MODES}
    closed, open_, models, alternatives, pipeline, training, endurance, *others = added.values()
    memory, versions, batches, streams, host, replicas, routing, scaling, profile, page = others
    for command in (closed, open_, models, alternatives, pipeline):
        _add_options(command)
    pipeline.add_argument("folder", type=Path, help="folder with a pipeline of diffusers without classes")
    closed.add_argument(
        "--clients",
        type=integer(1, 1024),
        nargs="+",
        default=CLIENTS,
        help=f"numbers of clients with one image per request; default: {' '.join(map(str, CLIENTS))}",
    )
    open_.add_argument(
        "--shares",
        type=positive,
        nargs="+",
        default=SHARES,
        help=f"request rates as fractions of the capacity; default: {' '.join(map(str, SHARES))}",
    )
    alternatives.add_argument(
        "--requests",
        choices=REQUESTS,
        default=REQUESTS[0],
        help=f"small: 1 image per request, large: 64 images per request; default: {REQUESTS[0]}",
    )
    training.add_argument(
        "--repeats", type=integer(1, 100), default=5, help="measurements of each training loop; default: 5"
    )
    training.add_argument(
        "--preset", default="default", help="name of a recipe, or path to a .toml file; default: default"
    )
    training.add_argument(
        "--steps", type=integer(1, 100_000), default=30, help="training steps per repeat; default: 30"
    )
    training.add_argument(
        "--data-dir",
        type=Path,
        default=Path("data"),
        help="folder with MNIST's IDX files, downloaded if missing; default: data",
    )
    endurance.add_argument("--minutes", type=positive, default=60.0, help="minutes of load; default: 60")
    versions.add_argument(
        "--base",
        type=Path,
        required=True,
        help="folder of the other version, such as a git worktree, or . for this one",
    )
    versions.add_argument(
        "--setting",
        type=setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of this version only, such as UNFOG_MODELS=default,letters; can be repeated",
    )
    for command in (versions, streams):
        command.add_argument("--pairs", type=integer(1, 100), default=5, help="pairs of measurements; default: 5")
        command.add_argument("--seconds", type=positive, default=24.0, help="seconds per service and pair; default: 24")
    batches.add_argument("--repeats", type=integer(1, 100), default=5, help="rounds of measurements; default: 5")
    batches.add_argument("--seconds", type=positive, default=30.0, help="seconds per measurement; default: 30")
    host.add_argument("--base", type=Path, help="folder of another version to compare with, such as a git worktree")
    host.add_argument(
        "--repeats", type=integer(1, 100), default=5, help="measurements of each figure and version; default: 5"
    )
    host.add_argument("--seconds", type=positive, default=6.0, help="seconds per load over HTTP; default: 6")
    _add_scaling_arguments(replicas, routing, scaling)
    profile.add_argument("--rows", type=integer(1, 4096), default=64, help="rows per step; default: 64")
    profile.add_argument("--num-threads", type=integer(1, 1024), help="compute threads; default: PyTorch's choice")
    measured = closed, open_, models, alternatives, pipeline, training, endurance, memory, versions
    for command in (*measured, batches, streams, host, replicas, routing, profile):
        command.add_argument("--out", type=Path, required=command is not profile, help=".json file for the raw results")
    page.add_argument("folder", type=Path, help="folder with JSON files of the other modes, all from one machine")
    page.add_argument("--out", type=file_to_write(".md"), required=True, help="page to write, a .md file")
    return parser


def _add_scaling_arguments(
    replicas: argparse.ArgumentParser, routing: argparse.ArgumentParser, scaling: argparse.ArgumentParser
) -> None:
    replicas.add_argument(
        "--repeats", type=integer(1, 100), default=5, help="measurements of each request rate; default: 5"
    )
    replicas.add_argument("--seconds", type=positive, default=40.0, help="seconds per measurement; default: 40")
    replicas.add_argument(
        "--loop-seconds",
        type=positive,
        default=4.0,
        help="seconds of each closed loop that measures the inputs of the simulation; default: 4",
    )
    routing.add_argument("measured", type=Path, help="JSON file of the mode replicas")
    routing.add_argument(
        "--requests", type=integer(100), default=20_000, help="requests that count in each simulation; default: 20000"
    )
    scaling.add_argument("folder", type=Path, help="folder with the results: docs/results, or a copy with your values")


def _add_options(command: argparse.ArgumentParser) -> None:
    """Adds the arguments that `_options` reads."""
    command.add_argument("--repeats", type=integer(1, 100), default=5, help="starts of each service; default: 5")
    command.add_argument("--seconds", type=integer(1, 86_400), default=20, help="seconds per measurement; default: 20")
    command.add_argument(
        "--turns", type=integer(1, 1000), default=1, help="measurements per start; each counts as a repeat; default: 1"
    )
    command.add_argument(
        "--settle", type=integer(0, 86_400), default=8, help="seconds of load before a measurement begins; default: 8"
    )
    command.add_argument(
        "--objective",
        type=positive,
        default=OBJECTIVE,
        help="latency limit in seconds; slower requests do not count in goodput; default: 5",
    )
    command.add_argument(
        "--max-batch",
        type=integer(1, 4096),
        nargs="*",
        default=[],
        help="also measure this service with these values of UNFOG_MAX_BATCH",
    )


if __name__ == "__main__":
    main()
