"""Plots figures as PNG files: `python -m scripts.plot noise|reverse|losses|epochs|sheet|bench --out figure.png`."""

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
    args = build_parser().parse_args(argv)
    if args.command != "sheet":  # the sheet is written without matplotlib
        require_installed("matplotlib")
    with Reporter() as reporter:
        match args.command:
            case "noise" if args.data_dir:
                if given := given_options(args, kept=["checkpoint", "seed"]):
                    raise ScriptError(f"{given[0]} has no effect with --data-dir, which shows a real digit. Remove it")
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
        reporter.line(f"wrote {args.out} ({args.out.stat().st_size / 1000:.0f} kB)")


def plot_bench(file: Path, out: Path) -> None:
    """Writes a figure of the results of scripts.bench. Raises ScriptError if `file` is not a result file."""
    try:
        figure = show_bench(json.loads(file.read_text("utf-8"))["rows"])
    except (KeyError, TypeError, ValueError) as error:
        raise ScriptError(f"{file} is not a result file of scripts.bench") from error
    save_figure(figure, out, grey=False)


def build_parser() -> Parser:
    parser = Parser(prog="python -m scripts.plot", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="noise|reverse|losses|epochs|sheet|bench", dest="command")

    noise = commands.add_parser("noise", help="forward process: one digit at t = 0, 10, ..., 100")
    noise.add_argument("--digit", type=integer(0, 9), default=7, help="digit to show, 0 to 9; default: 7")
    noise.add_argument(
        "--data-dir", type=Path, help="folder with the IDX files of MNIST: show a real digit instead of a generated one"
    )
    reverse = commands.add_parser("reverse", help="reverse process: ten digits from noise to image")
    sheet = commands.add_parser("sheet", help="grid with ten images of each digit")
    for command in (noise, reverse, sheet):
        add_drawing_arguments(command, seed=0, without=() if command is sheet else ("--batch-size",))

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
    bench = commands.add_parser("bench", help="results of scripts.bench")
    bench.add_argument("file", type=Path, help="JSON file that scripts.bench wrote")
    for command in (noise, reverse, sheet, losses, epochs, bench):
        command.add_argument("--out", type=file_to_write(".png"), required=True, help="the .png file to write")
    return parser


if __name__ == "__main__":
    main()
