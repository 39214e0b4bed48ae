"""Compares ways to draw, and checkpoints: `python -m scripts.compare steps --out sweep/`.

steps     each sampler at 1, 2, 4, 6, 10, 20, 50 and 100 steps: a table and a figure
guidance  scales and intervals of steps in which they act: a table
runs      the evaluations that scripts.evaluate left, side by side: a table
networks  weights, arithmetic and time of a step of each recipe's network: a table

A sweep that was stopped goes on where it was. Sweeps choose: they never see the test split.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from model.checkpoint import write_atomically
from model.precision import can_compile, no_compiler
from model.sampler import SAMPLERS, Guidance
from model.unet import UNet
from scripts.benchmark.step_time import COLUMNS, as_row, costs_of
from scripts.common.arguments import Parser, add_drawing_arguments, guidance_scale, integer, num_images
from scripts.common.drawing import Drawer, DrawingOptions, open_drawer, options_from
from scripts.common.errors import ScriptError, reports_errors
from scripts.common.figures import save_figure
from scripts.common.mnist import NUM_CLASSES
from scripts.common.progress import Reporter, require_installed
from scripts.evaluation.classifiers import load_classifier
from scripts.evaluation.samples import FEWEST_OF_EACH, MOST_IMAGES, SPLITS, load_references
from scripts.evaluation.tables import (
    RUN_COLUMNS,
    across,
    as_run,
    as_table,
    check_comparable,
    read_evaluation,
)
from scripts.training.recipe import load_recipe

if TYPE_CHECKING:
    from scripts.evaluation.sweep import Sweep

SEED = 1  # choices are made on other noise than the figures that are published
STEPS = (1, 2, 4, 6, 10, 20, 50, 100)
SCALES = (1.25, 1.5, 2.0, 3.0)
INTERVALS = ((1, 100), (1, 80), (20, 100), (20, 80), (30, 90), (10, 60))


SWEPT = {  # options that take many values in a sweep, in lists of their own
    "steps": ("--sampler", "--num-steps"),
    "guidance": ("--guidance-scale", "--guidance-start", "--guidance-stop"),
}


@reports_errors("compare")
def main(argv: list[str] | None = None) -> None:
    """Parses the arguments and runs the subcommand."""
    args = _parse(argv)
    if args.command in SWEPT:
        require_installed("torchmetrics", "matplotlib", extra="evaluate")
    with Reporter("compare: stopped; start again to go on") as reporter:
        args.run(args, reporter)


def _steps(args: argparse.Namespace, reporter: Reporter) -> None:
    drawer = open_drawer(args)
    loaded = drawer.checkpoint
    config, T = loaded.config, loaded.schedule.num_steps
    permitted = config.steps or range(1, T + 1)
    samplers = args.samplers or config.samplers
    steps = args.steps or sorted(config.steps) or [num_steps for num_steps in STEPS if num_steps <= T]
    if not set(samplers) <= set(config.samplers) or not set(steps) <= set(permitted):
        raise ScriptError("this checkpoint does not permit those samplers or numbers of steps")
    settings = [
        options_from(argparse.Namespace(**{**vars(args), "sampler": sampler, "num_steps": num_steps}), loaded)
        for sampler in samplers  # each with the guidance that is recommended for it
        for num_steps in steps
    ]
    sweep = _sweep(args, drawer, reporter)
    rows = sweep.run(settings, reporter)
    from scripts.evaluation.sweep import show_steps

    _write_table(args, sweep.as_markdown(rows), reporter)
    save_figure(show_steps(rows), args.out / "steps.png", grey=False)


def _guidance(args: argparse.Namespace, reporter: Reporter) -> None:
    drawer = open_drawer(args)
    if not drawer.checkpoint.config.guidable:
        raise ScriptError("this checkpoint cannot be guided: no label was dropped in its training")
    own, T = options_from(args, drawer.checkpoint), drawer.checkpoint.schedule.num_steps
    if max(stop for _, stop in args.intervals) > T:
        raise ScriptError(f"this checkpoint has {T} steps: no interval may end above")
    swept = [(scale, *interval) for scale in args.scales if scale != 1 for interval in args.intervals]
    guidances = [Guidance(), *(Guidance(scale, start, stop) for scale, start, stop in swept)]
    sweep = _sweep(args, drawer, reporter)
    rows = sweep.run([DrawingOptions(own.sampler, own.num_steps, guidance) for guidance in guidances], reporter)
    _write_table(args, sweep.as_markdown(rows), reporter)


def _write_table(args: argparse.Namespace, table: str, reporter: Reporter) -> None:
    path = args.out / f"{args.command}.md"
    write_atomically(path, table.encode())
    reporter.line(f"the table, with real digits beside: {path}")


def _runs(args: argparse.Namespace, reporter: Reporter) -> None:
    read = {(path.parent if path.is_file() else path).name: read_evaluation(path) for path in args.evaluations}
    if len(read) < len(args.evaluations):
        raise ScriptError("evaluations are told apart by the names of their folders, and two have the same")
    check_comparable(list(read.values()))
    rows = [as_run(name, evaluation) for name, evaluation in read.items()]
    table = across(read) if args.across else as_table(RUN_COLUMNS, rows)
    reporter.line(table)
    if args.out:
        write_atomically(args.out, table.encode())


def _networks(args: argparse.Namespace, reporter: Reporter) -> None:
    if args.compile and not can_compile():
        raise ScriptError(f"--compile {no_compiler()}")
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    networks = {Path(preset).stem: UNet(load_recipe(preset).unet) for preset in args.presets}
    if len(networks) < len(args.presets):
        raise ScriptError("recipes are told apart by their names, and two have the same")
    costs = costs_of(networks, reporter, rows=args.rows, compiled=args.compile)
    reporter.line(as_table(COLUMNS, [as_row(name, cost) for name, cost in costs.items()]))


def _sweep(args: argparse.Namespace, drawer: Drawer, reporter: Reporter) -> "Sweep":
    from scripts.evaluation.quality import Evaluator
    from scripts.evaluation.sweep import Sweep

    references = load_references(args.split, args.data_dir)
    evaluator = Evaluator(references, load_classifier("judge"), load_classifier("extractor"), args.num_images)
    drawer.compile(args.compile, reporter)
    return Sweep(drawer, evaluator, args.out / f"{args.command}.json", args.seed, args.batch_size)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m scripts.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="steps|guidance|runs|networks", dest="command")
    steps = commands.add_parser("steps", help="quality against the number of steps, for each sampler")
    steps.add_argument("--steps", type=integer(1), nargs="+", help=f"default: {_listed(STEPS)}, or a student's own")
    steps.add_argument("--samplers", choices=SAMPLERS, nargs="+", help="default: all that the checkpoint permits")
    steps.set_defaults(run=_steps)
    guidance = commands.add_parser("guidance", help="quality against scale and interval")
    guidance.add_argument(
        "--scales", type=guidance_scale, nargs="+", default=SCALES, help=f"default: {_listed(SCALES)}"
    )
    pairs = [f"{start}-{stop}" for start, stop in INTERVALS]
    guidance.add_argument(
        "--intervals", type=_interval, nargs="+", default=INTERVALS, metavar="A-B", help=f"default: {_listed(pairs)}"
    )
    guidance.set_defaults(run=_guidance)
    for name, command in (("steps", steps), ("guidance", guidance)):
        _add_sweep(command)
        add_drawing_arguments(command, seed=SEED, without=SWEPT[name])
    runs = commands.add_parser("runs", help="evaluations side by side")
    runs.add_argument("evaluations", type=Path, nargs="+", help="folders that hold an evaluation.json")
    runs.add_argument("--across", action="store_true", help="a column each, beside real digits; default: a line each")
    runs.add_argument("--out", type=Path, help="a .md file for the table")
    runs.set_defaults(run=_runs)
    _add_networks(commands.add_parser("networks", help="weights, arithmetic and time of networks"))
    return parser.parse_args(argv)


def _add_sweep(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--num-images",
        type=num_images(NUM_CLASSES * FEWEST_OF_EACH, MOST_IMAGES),
        default=2_000,
        help="100 or more, a multiple of 10; default: 2000",
    )
    command.add_argument(
        "--split",
        choices=[split for split in SPLITS if split != "test"],
        default="validation",
        help="the real digits beside: of few writers that nobody learned from (default), or of all writers",
    )
    command.add_argument("--out", type=Path, required=True, help="folder for the figures; a sweep in it goes on")
    command.add_argument("--data-dir", type=Path, default=Path("data"), help="IDX files; downloaded if missing")


def _add_networks(networks: argparse.ArgumentParser) -> None:
    networks.add_argument("presets", nargs="+", help="names of recipes, or paths to .toml files")
    networks.add_argument("--rows", type=integer(1, 10_000), default=64, help="of a step; default: 64")
    networks.add_argument("--compile", action="store_true", help="measure the compiled networks")
    networks.add_argument("--num-threads", type=integer(1, 1024), help="compute threads")
    networks.set_defaults(run=_networks)


def _listed(values: Iterable[object]) -> str:
    return " ".join(map(str, values))


def _interval(text: str) -> tuple[int, int]:
    start, _, stop = text.partition("-")
    if not (start.isdecimal() and stop.isdecimal() and 1 <= int(start) <= int(stop)):
        raise argparse.ArgumentTypeError(f"{text!r} is not an interval of timesteps like 20-80")
    return int(start), int(stop)


if __name__ == "__main__":
    main()
