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

from model.sampler import SAMPLERS
from scripts.common.arguments import (
    Parser,
    add_drawing_arguments,
    from_arguments,
    guidance_scale,
    integer,
    num_images,
)
from scripts.common.drawing import DrawingRequest
from scripts.common.errors import reports_errors
from scripts.common.mnist import NUM_CLASSES
from scripts.common.progress import Reporter, require_installed
from scripts.evaluation.comparison import (
    STEPS,
    SweepRequest,
    compare_guidance,
    compare_networks,
    compare_runs,
    compare_steps,
)
from scripts.evaluation.samples import FEWEST_OF_EACH, MOST_IMAGES, SPLITS

SEED = 1  # choices are made on other noise than the figures that are published
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
        match args.command:
            case "steps":
                drawing, sweep = from_arguments(DrawingRequest, args), from_arguments(SweepRequest, args)
                compare_steps(drawing, sweep, reporter, samplers=args.samplers, steps=args.steps)
            case "guidance":
                drawing, sweep = from_arguments(DrawingRequest, args), from_arguments(SweepRequest, args)
                compare_guidance(drawing, sweep, reporter, scales=args.scales, intervals=args.intervals)
            case "runs":
                compare_runs(args.evaluations, args.out, reporter, columns=args.across)
            case "networks":
                options = {"rows": args.rows, "compiled": args.compile, "num_threads": args.num_threads}
                compare_networks(args.presets, reporter, **options)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m scripts.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="steps|guidance|runs|networks", dest="command")
    steps = commands.add_parser("steps", help="quality against the number of steps, for each sampler")
    steps.add_argument("--steps", type=integer(1), nargs="+", help=f"default: {_listed(STEPS)}, or a student's own")
    steps.add_argument("--samplers", choices=SAMPLERS, nargs="+", help="default: all that the checkpoint permits")
    guidance = commands.add_parser("guidance", help="quality against scale and interval")
    guidance.add_argument(
        "--scales", type=guidance_scale, nargs="+", default=SCALES, help=f"default: {_listed(SCALES)}"
    )
    pairs = [f"{start}-{stop}" for start, stop in INTERVALS]
    guidance.add_argument(
        "--intervals", type=_interval, nargs="+", default=INTERVALS, metavar="A-B", help=f"default: {_listed(pairs)}"
    )
    for name, command in (("steps", steps), ("guidance", guidance)):
        _add_sweep(command)
        add_drawing_arguments(command, seed=SEED, without=SWEPT[name])
    runs = commands.add_parser("runs", help="evaluations side by side")
    runs.add_argument("evaluations", type=Path, nargs="+", help="folders that hold an evaluation.json")
    runs.add_argument("--across", action="store_true", help="a column each, beside real digits; default: a line each")
    runs.add_argument("--out", type=Path, help="a .md file for the table")
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


def _listed(values: Iterable[object]) -> str:
    return " ".join(map(str, values))


def _interval(text: str) -> tuple[int, int]:
    start, _, stop = text.partition("-")
    if not (start.isdecimal() and stop.isdecimal() and 1 <= int(start) <= int(stop)):
        raise argparse.ArgumentTypeError(f"{text!r} is not an interval of timesteps like 20-80")
    return int(start), int(stop)


if __name__ == "__main__":
    main()
