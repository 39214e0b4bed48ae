"""Plots figures: `python -m scripts.plot FIGURE --out figure.png`. The animation is a WebP file, the others are PNG."""

import argparse
import json
from pathlib import Path

from model.checkpoint import read_config
from scripts.benchmark.figures import show_bench
from scripts.benchmark.timeline import plot_timeline
from scripts.common.animation import plot_animation
from scripts.common.arguments import (
    Parser,
    add_drawing_arguments,
    file_to_write,
    from_arguments,
    given_options,
    integer,
)
from scripts.common.drawing import DrawingRequest, check_guidable, check_options
from scripts.common.errors import ScriptError, reports_errors
from scripts.common.figures import save_figure
from scripts.common.plots import (
    plot_drawn_noise,
    plot_epochs,
    plot_guidance,
    plot_losses,
    plot_real_noise,
    plot_reverse,
    plot_sheet,
)
from scripts.common.progress import Reporter, require_installed
from scripts.evaluation.sweep import plot_steps
from scripts.evaluation.tradeoff import plot_tradeoff

FROM_CHECKPOINT = ("noise", "reverse", "animation", "guidance", "sheet")
WITHOUT_AXES = ("animation", "sheet")  # written without matplotlib, except a sheet with real digits


@reports_errors("plot")
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.command in FROM_CHECKPOINT:
        _check_options(args)
    if args.command not in WITHOUT_AXES or getattr(args, "data_dir", None):
        require_installed("matplotlib")
    with Reporter() as reporter:
        if args.command in FROM_CHECKPOINT:
            _plot_digits(args, reporter)
        else:
            _plot_results(args)
        reporter.line(f"wrote {args.out} ({args.out.stat().st_size / 1000:.0f} kB)")


def _check_options(args: argparse.Namespace) -> None:
    """Raises CheckpointError or ScriptError for options that have no effect or that the checkpoint does not permit."""
    if args.command == "noise" and args.data_dir:
        if given := given_options(args, kept=["checkpoint", "seed"]):
            raise ScriptError(f"{given[0]} has no effect with --data-dir, which shows a real digit. Remove it")
    elif args.command == "guidance":
        check_guidable(read_config(args.checkpoint))
    check_options(from_arguments(DrawingRequest, args))


def _plot_digits(args: argparse.Namespace, reporter: Reporter) -> None:
    match args.command:
        case "noise" if args.data_dir:
            plot_real_noise(args.checkpoint, args.data_dir, args.digit, args.out, seed=args.seed)
        case "noise":
            plot_drawn_noise(from_arguments(DrawingRequest, args), args.digit, args.out, reporter)
        case "reverse":
            plot_reverse(from_arguments(DrawingRequest, args), args.out, reporter)
        case "animation":
            plot_animation(from_arguments(DrawingRequest, args), args.out, reporter)
        case "guidance":
            plot_guidance(from_arguments(DrawingRequest, args), args.out, reporter)
        case "sheet":
            plot_sheet(from_arguments(DrawingRequest, args), args.out, reporter, data_dir=args.data_dir)


def _plot_results(args: argparse.Namespace) -> None:
    match args.command:
        case "losses":
            plot_losses(args.runs, args.out)
        case "epochs":
            plot_epochs(args.folder, args.epochs, args.out)
        case "steps":
            plot_steps(args.file, args.fast, args.out)
        case "tradeoff":
            plot_tradeoff(args.file, args.evaluations, args.out)
        case "bench":
            plot_bench(args.file, args.out)
        case "timeline":
            plot_timeline(args.file, args.out)


def plot_bench(file: Path, out: Path) -> None:
    """Writes a figure of the results of scripts.bench. Raises ScriptError if `file` is not a result file."""
    try:
        figure = show_bench(json.loads(file.read_text("utf-8"))["rows"])
    except (KeyError, TypeError, ValueError) as error:
        raise ScriptError(f"{file} is not a result file of scripts.bench") from error
    save_figure(figure, out, grey=False)


def build_parser() -> Parser:
    parser = Parser(prog="python -m scripts.plot", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="FIGURE", dest="command")

    noise = commands.add_parser("noise", help="forward process: one digit at t = 0, 10, ..., 100")
    noise.add_argument("--digit", type=integer(0, 9), default=7, help="digit to show, 0 to 9; default: 7")
    reverse = commands.add_parser("reverse", help="reverse process: ten digits from noise to image")
    animation = commands.add_parser("animation", help="the reverse process as an animation")
    guidance = commands.add_parser("guidance", help="ten digits from the same noise, with guidance scales from 1 to 10")
    sheet = commands.add_parser("sheet", help="grid with ten images of each digit")
    for command in (noise, sheet):
        extent = "a real digit instead of a generated one" if command is noise else "real digits next to them"
        command.add_argument("--data-dir", type=Path, help=f"folder with the IDX files of MNIST: show {extent}")
    for command in (noise, reverse, animation, sheet):
        add_drawing_arguments(command, seed=0, without=() if command is sheet else ("--batch-size",))
    add_drawing_arguments(guidance, seed=0, without=("--batch-size", "--guidance-scale"))

    losses = commands.add_parser("losses", help="training and validation loss per epoch")
    losses.add_argument("runs", type=Path, nargs="+", help="run folders, or their losses.csv files")
    epochs = commands.add_parser("epochs", help="the same ten digits after several epochs of a run")
    epochs.add_argument("folder", type=Path, help="run folder")
    epochs.add_argument(
        "--epochs",
        type=integer(1),
        nargs="+",
        help="epochs to show; default: 1 5 15 30, and the last epoch of a shorter run",
    )
    steps = commands.add_parser("steps", help="quality of each sampler by number of steps")
    steps.add_argument("file", type=Path, help="steps.json that scripts.compare wrote")
    steps.add_argument("--fast", type=Path, help="steps.json of the checkpoint `fast`, shown as a point")
    tradeoff = commands.add_parser("tradeoff", help="quality against latency of the published settings")
    tradeoff.add_argument("file", type=Path, help="JSON file that `scripts.bench models` wrote")
    tradeoff.add_argument(
        "--evaluations",
        type=Path,
        default=Path("docs/results/final"),
        help="folder with one evaluation for each setting; default: docs/results/final",
    )
    bench = commands.add_parser("bench", help="results of scripts.bench")
    bench.add_argument("file", type=Path, help="JSON file that scripts.bench wrote")
    timeline = commands.add_parser("timeline", help="batching per step and per request, simulated")
    timeline.add_argument("file", type=Path, help="JSON file that `scripts.bench open` wrote, for its step times")
    for command in (noise, reverse, guidance, sheet, losses, epochs, steps, tradeoff, bench, timeline):
        command.add_argument("--out", type=file_to_write(".png"), required=True, help="the .png file to write")
    animation.add_argument("--out", type=file_to_write(".webp"), required=True, help="the .webp file to write")
    return parser


if __name__ == "__main__":
    main()
