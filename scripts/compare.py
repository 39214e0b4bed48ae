"""Compares sampling settings, checkpoints and networks: `python -m scripts.compare steps --out sweep/`.

steps     quality of each sampler with 1, 2, 4, 6, 10, 20, 50 and 100 steps: a table and a plot
guidance  quality with each guidance scale and each interval of timesteps with guidance: a table
runs      evaluations written by scripts.evaluate: a table
networks  number of weights, arithmetic and time per step of each recipe's network: a table

A stopped sweep continues if it is started again. Sweeps are for choosing settings, so they never use the test split.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

from model.checkpoint import read_config
from model.spec import SAMPLERS
from scripts.common.arguments import (
    CLIP_GUIDANCE,
    Parser,
    add_drawing_arguments,
    from_arguments,
    guidance_scale,
    integer,
    interval,
    num_images,
)
from scripts.common.drawing import DrawingRequest, check_guidable, check_options
from scripts.common.errors import ScriptError, reports_errors
from scripts.common.mnist import NUM_CLASSES
from scripts.common.progress import Reporter, require_installed
from scripts.evaluation.comparison import (
    STEPS,
    SweepRequest,
    check_intervals,
    choose_steps,
    compare_guidance,
    compare_networks,
    compare_runs,
    compare_steps,
)
from scripts.evaluation.samples import FEWEST_OF_EACH, MOST_IMAGES, SPLITS, most_images
from scripts.evaluation.spaces import DIGITS_NEED

SEED = 1  # differs from the seed of the published figures, so that settings are not chosen on the same noise
SCALES = (1.25, 1.5, 2.0, 3.0)
INTERVALS = ((1, 100), (1, 80), (20, 100), (20, 80), (30, 90), (10, 60))
# The sweep sets these options itself, from lists such as --scales. It has no CLIP guidance.
SWEPT = {
    "steps": ("--sampler", "--num-steps", *CLIP_GUIDANCE),
    "guidance": ("--guidance-scale", "--guidance-start", "--guidance-stop", *CLIP_GUIDANCE),
}


@reports_errors("compare")
def main(argv: list[str] | None = None) -> None:
    """Parses the arguments and runs the subcommand."""
    args = build_parser().parse_args(argv)
    if args.command in SWEPT:
        _check_sweep(args)
        require_installed("torchmetrics", "matplotlib", *DIGITS_NEED, extra="evaluate")
    with Reporter(lambda: "compare: stopped. Run the same command again to continue") as reporter:
        match args.command:
            case "steps":
                drawing, sweep = from_arguments(DrawingRequest, args), from_arguments(SweepRequest, args)
                samplers, steps = choose_steps(read_config(args.checkpoint), args.samplers, args.steps)
                compare_steps(drawing, sweep, reporter, samplers=samplers, steps=steps)
            case "guidance":
                drawing, sweep = from_arguments(DrawingRequest, args), from_arguments(SweepRequest, args)
                compare_guidance(drawing, sweep, reporter, scales=args.scales, intervals=args.intervals)
            case "runs":
                compare_runs(args.evaluations, args.out, reporter, columns=args.across)
            case "networks":
                options = {"rows": args.rows, "compiled": args.compile, "num_threads": args.num_threads}
                compare_networks(args.presets, reporter, **options)


def _check_sweep(args: argparse.Namespace) -> None:
    """Raises CheckpointError or ScriptError if the split or the checkpoint does not permit the options."""
    if args.num_images > (most := most_images(args.split)):
        raise ScriptError(f"--num-images must be at most {most} with --split {args.split}")
    config = read_config(args.checkpoint)
    if args.command == "steps":
        choose_steps(config, args.samplers, args.steps)
    else:
        check_guidable(config)
        check_intervals(config, args.intervals)
    check_options(from_arguments(DrawingRequest, args))


def build_parser() -> Parser:
    parser = Parser(
        prog="python -m scripts.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="steps|guidance|runs|networks", dest="command")
    steps = commands.add_parser("steps", help="quality of each sampler by number of steps")
    steps.add_argument(
        "--steps",
        type=integer(1),
        nargs="+",
        help=f"numbers of steps; default: {_listed(STEPS)}, or those that a distilled checkpoint permits",
    )
    steps.add_argument("--samplers", choices=SAMPLERS, nargs="+", help="default: all that the checkpoint permits")
    guidance = commands.add_parser("guidance", help="quality by guidance scale and interval")
    guidance.add_argument(
        "--scales", type=guidance_scale, nargs="+", default=SCALES, help=f"guidance scales; default: {_listed(SCALES)}"
    )
    pairs = [f"{start}-{stop}" for start, stop in INTERVALS]
    guidance.add_argument(
        "--intervals",
        type=interval,
        nargs="+",
        default=INTERVALS,
        metavar="A-B",
        help=f"intervals of timesteps with guidance; default: {_listed(pairs)}",
    )
    for name, command in (("steps", steps), ("guidance", guidance)):
        _add_sweep(command)
        add_drawing_arguments(command, seed=SEED, without=SWEPT[name])
    runs = commands.add_parser("runs", help="table of evaluations")
    runs.add_argument("evaluations", type=Path, nargs="+", help="folders with an evaluation.json")
    runs.add_argument(
        "--across",
        action="store_true",
        help="one column per evaluation, and one for real digits; default: one row per evaluation",
    )
    runs.add_argument("--out", type=Path, help=".md file for the table; default: print only")
    _add_networks(commands.add_parser("networks", help="number of weights, arithmetic and step time of networks"))
    return parser


def _add_sweep(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--num-images",
        type=num_images(NUM_CLASSES * FEWEST_OF_EACH, MOST_IMAGES),
        default=2_000,
        help="number of images per setting, a multiple of 10, at least 100; default: 2000",
    )
    command.add_argument(
        "--split",
        choices=[split for split in SPLITS if split != "test"],
        default="validation",
        help="real digits to compare with. validation: few writers, not used for training. training: all writers. "
        "default: validation",
    )
    command.add_argument(
        "--out", type=Path, required=True, help="folder for the results; an unfinished sweep in it is continued"
    )
    command.add_argument(
        "--data-dir",
        type=Path,
        default=Path("data"),
        help="folder with MNIST's IDX files, downloaded if missing; default: data",
    )


def _add_networks(networks: argparse.ArgumentParser) -> None:
    networks.add_argument("presets", nargs="+", help="names of recipes, or paths to .toml files")
    networks.add_argument("--rows", type=integer(1, 10_000), default=64, help="rows per step; default: 64")
    networks.add_argument("--compile", action="store_true", help="measure the compiled networks")
    networks.add_argument("--num-threads", type=integer(1, 1024), help="compute threads; default: PyTorch's choice")


def _listed(values: Iterable[object]) -> str:
    return " ".join(map(str, values))


if __name__ == "__main__":
    main()
