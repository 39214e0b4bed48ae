"""Draws figures: `python -m scripts.plot noise|reverse|losses|epochs|sheet|bench --out picture.png`."""

import argparse
import json
from pathlib import Path

from scripts.benchmark.figures import show_bench
from scripts.common.arguments import (
    Parser,
    add_drawing_arguments,
    file_to_write,
    from_arguments,
    given_options,
    integer,
)
from scripts.common.drawing import DrawingRequest
from scripts.common.errors import ScriptError, reports_errors
from scripts.common.figures import save_figure
from scripts.common.plots import (
    plot_drawn_noise,
    plot_epochs,
    plot_losses,
    plot_real_noise,
    plot_reverse,
    plot_sheet,
)
from scripts.common.progress import Reporter, require_installed


@reports_errors("plot")
def main(argv: list[str] | None = None) -> None:
    """Parses the arguments and draws the figure."""
    args = _parse(argv)
    if args.command != "sheet":  # the sheet is a grid of images, without axes
        require_installed("matplotlib")
    with Reporter() as reporter:
        match args.command:
            case "noise" if args.data_dir:
                if given := given_options(args, kept=["checkpoint", "seed"]):
                    raise ScriptError(f"the digit of --data-dir is not drawn: leave out {given[0]}")
                plot_real_noise(args.checkpoint, args.data_dir, args.digit, args.out, seed=args.seed)
            case "noise":
                plot_drawn_noise(from_arguments(DrawingRequest, args), args.digit, args.out, reporter)
            case "reverse":
                plot_reverse(from_arguments(DrawingRequest, args), args.out, reporter)
            case "sheet":
                plot_sheet(from_arguments(DrawingRequest, args), args.out, reporter)
            case "losses":
                plot_losses(args.runs, args.out)
            case "epochs":
                plot_epochs(args.folder, args.epochs, args.out)
            case "bench":
                plot_bench(args.file, args.out)
        reporter.line(f"{args.out}: {args.out.stat().st_size / 1000:.0f} kB")


def plot_bench(file: Path, out: Path) -> None:
    """Writes the figure of a file of scripts.bench. Raises ScriptError for another file."""
    try:
        figure = show_bench(json.loads(file.read_text("utf-8"))["rows"])
    except (KeyError, TypeError, ValueError) as error:
        raise ScriptError(f"{file} is none of scripts.bench's files") from error
    save_figure(figure, out, grey=False)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m scripts.plot", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="noise|reverse|losses|epochs|sheet|bench", dest="command")

    noise = commands.add_parser("noise", help="the forward process: one digit at t = 0, 10, ... 100")
    noise.add_argument("--digit", type=integer(0, 9), default=7, help="default: 7")
    noise.add_argument("--data-dir", type=Path, help="IDX files of MNIST, for a real digit instead of a drawn one")
    reverse = commands.add_parser("reverse", help="the reverse process: ten digits from static, step by step")
    sheet = commands.add_parser("sheet", help="ten images of each digit")
    for command in (noise, reverse, sheet):
        add_drawing_arguments(command, seed=0, without=() if command is sheet else ("--batch-size",))

    losses = commands.add_parser("losses", help="training and validation loss by epoch")
    losses.add_argument("runs", type=Path, nargs="+", help="folders of runs, or their losses.csv")
    epochs = commands.add_parser("epochs", help="the same digits after several epochs of a run")
    epochs.add_argument("folder", type=Path, help="folder of the run")
    epochs.add_argument("--epochs", type=integer(1), nargs="+", help="default: 1 5 15 30, or the last")
    bench = commands.add_parser("bench", help="what scripts.bench measured")
    bench.add_argument("file", type=Path, help="its JSON")
    for command in (noise, reverse, sheet, losses, epochs, bench):
        command.add_argument("--out", type=file_to_write(".png"), required=True, help="the .png to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
