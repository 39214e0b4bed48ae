"""Draws figures: `python -m scripts.plot noise|reverse|losses|epochs|sheet|bench --out picture.png`."""

import argparse
import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from model import checkpoint
from model.diffusion import Diffusion
from model.pixels import from_pixels
from model.schedule import Schedule
from scripts.benchmark.figures import show_bench
from scripts.common.arguments import Parser, add_drawing_arguments, file_to_write, given_options, integer
from scripts.common.drawing import Drawer, DrawingOptions, open_drawer, options_from
from scripts.common.errors import ScriptError, reports_errors
from scripts.common.figures import Panel, draw_panels, new_figure, save_figure
from scripts.common.mnist import load_mnist
from scripts.common.pictures import grid, save_grid
from scripts.common.progress import Reporter, require, require_installed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

USUAL_EPOCHS = (1, 5, 15, 30)
ROW_GAP = 4  # white pixels between the grids of two epochs
NUM_NOISE_COLUMNS = 11  # t = 0, 10, ... 100
Losses = dict[str, list[float]]  # column -> a value an epoch


def show_noise_progression(x_0: Tensor, schedule: Schedule, *, seed: int = 0) -> "Figure":
    """The forward process: one image (C, H, W) in [-1, 1] at t = 0, T/10, ... T, always with the same noise."""
    diffusion = Diffusion(schedule, torch.Generator().manual_seed(seed))
    t = torch.linspace(0, schedule.num_steps, NUM_NOISE_COLUMNS).round().long()
    eps = torch.randn(x_0.shape, generator=diffusion.generator).expand(len(t), *x_0.shape)
    x_t, _ = diffusion.add_noise(x_0.expand_as(eps), t, eps)  # (11, C, H, W)
    labels = [f"t = {step}" for step in t.tolist()]
    return draw_panels([Panel(grid(x_t, len(t)), labels)], scale=3)


def show_reverse_process(drawer: Drawer, options: DrawingOptions, reporter: Reporter, *, seed: int) -> "Figure":
    """Every digit on its way from the same static: x_t on the left, the x_0 predicted from it on the right."""
    frames: list[tuple[int, Tensor, Tensor]] = []

    def keep(t: int, x_t: Tensor, x_0: Tensor) -> None:
        frames.append((t, x_t.cpu(), x_0.cpu()))

    y = torch.arange(len(drawer.class_names))
    x_0 = drawer.draw(y, torch.zeros_like(y), options, reporter, seed=seed, batch_size=len(y), on_step=keep)
    frames.append((0, x_0, x_0))
    shown = [frames[i] for i in spread(len(frames), 6)]
    columns = [f"t = {t}" for t, _, _ in shown]
    now = rearrange([x_t for _, x_t, _ in shown], "k b c h w -> (b k) c h w")
    predicted = rearrange([x_0 for _, _, x_0 in shown], "k b c h w -> (b k) c h w")
    panels = [
        Panel(grid(now, len(shown)), columns, drawer.class_names, "$x_t$"),
        Panel(grid(predicted, len(shown)), columns, title="predicted $x_0$"),
    ]
    return draw_panels(panels, scale=2)


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` of the numbers 0..count-1 (or all, if they are fewer), evenly, the first and the last among them."""
    wanted = min(wanted, count)
    return [round(i * (count - 1) / max(wanted - 1, 1)) for i in range(wanted)]


def show_losses(losses: dict[str, Losses]) -> "Figure":
    """Training and validation loss by epoch, a colour a run."""
    figure = new_figure(760, 400)
    axes = figure.add_subplot()
    for i, (name, columns) in enumerate(losses.items()):
        epoch = columns["epoch"]
        marker = "." if len(epoch) < 3 else None
        axes.plot(epoch, columns["train_loss"], f"C{i}--", marker=marker, linewidth=1, label=f"{name}, training")
        axes.plot(epoch, columns["validation_loss"], f"C{i}-", marker=marker, label=f"{name}, validation")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.xaxis.set_major_locator(require("matplotlib.ticker").MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    axes.tick_params(which="both", labelsize=8)
    axes.grid(which="both", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    return figure


def read_losses(path: Path) -> Losses:
    """The losses.csv of a run, by its own path or its run's; ScriptError where it is missing or another file."""
    path = path / "losses.csv" if path.is_dir() else path
    try:
        rows = list(csv.DictReader(path.read_text().splitlines()))
        names = ("epoch", "train_loss", "validation_loss")
        columns = {name: [float(row[name]) for row in rows] for name in names}
    except OSError as error:
        raise ScriptError(f"{path} cannot be read: {error.strerror}") from error
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise ScriptError(f"{path} is not the losses.csv of a run") from error
    if not rows:
        raise ScriptError(f"{path} holds no epoch yet")
    return columns


def show_epochs(run: Path, epochs: Sequence[int] | None = None) -> "Figure":
    """The same ten digits after several epochs, a row each; ScriptError for an epoch that the run does not have.

    Epochs 1, 5, 15 and 30 by default, and the run's last instead of those that it does not have.
    """
    folder = run / "epochs"
    there = sorted(int(path.stem) for path in folder.glob("*.png") if re.fullmatch(r"\d+", path.stem))
    if not there:
        raise ScriptError(f"{folder} has no picture of an epoch")
    epochs = epochs or sorted({min(epoch, there[-1]) for epoch in USUAL_EPOCHS})
    missing = sorted(set(epochs) - set(there))
    if missing:
        raise ScriptError(f"{folder} has no picture of epoch {missing[0]}: its last is {there[-1]}")
    grids = []
    for epoch in epochs:
        with Image.open(folder / f"{epoch:02d}.png") as image:
            pixels = torch.tensor(list(image.convert("L").tobytes()), dtype=torch.uint8)
            grids.append(F.pad(pixels.view(image.height, image.width), (0, 0, 0, ROW_GAP), value=255))
    if len({pixels.shape for pixels in grids}) > 1:
        raise ScriptError(f"the pictures in {folder} differ in size: they are of different runs")
    labels = [f"epoch {epoch}" for epoch in epochs]
    return draw_panels([Panel(torch.cat(grids)[..., None], [str(digit) for digit in range(10)], labels)], scale=1)


@reports_errors("plot")
def main(argv: list[str] | None = None) -> None:
    """Parses the arguments and draws the figure."""
    args = _parse(argv)
    if args.run is not _sheet:  # which is a grid of images alone
        require_installed("matplotlib")
    with Reporter() as reporter:
        args.run(args, reporter)
        reporter.line(f"{args.out}: {args.out.stat().st_size / 1000:.0f} kB")


def _noise(args: argparse.Namespace, reporter: Reporter) -> None:
    if args.data_dir:
        given = given_options(args, kept=["checkpoint", "seed"])
        if given:
            raise ScriptError(f"the digit of --data-dir is not drawn: leave out {given[0]}")
        images, labels = load_mnist("test", args.data_dir)
        x_0, schedule = from_pixels(images[labels == args.digit][0]), checkpoint.load(args.checkpoint).schedule
    else:
        y, drawer = torch.tensor([args.digit]), open_drawer(args)
        options, schedule = options_from(args, drawer.checkpoint), drawer.checkpoint.schedule
        drawer.compile(args.compile, reporter)
        x_0 = drawer.draw(y, torch.zeros_like(y), options, reporter, seed=args.seed)[0]  # (C, H, W)
    save_figure(show_noise_progression(x_0, schedule, seed=args.seed), args.out, grey=True)


def _reverse(args: argparse.Namespace, reporter: Reporter) -> None:
    drawer = open_drawer(args)
    options = options_from(args, drawer.checkpoint)
    drawer.compile(args.compile, reporter)
    save_figure(show_reverse_process(drawer, options, reporter, seed=args.seed), args.out, grey=True)


def _losses(args: argparse.Namespace, reporter: Reporter) -> None:
    losses = {(path.parent if path.suffix == ".csv" else path).resolve().name: read_losses(path) for path in args.runs}
    save_figure(show_losses(losses), args.out, grey=False)


def _epochs(args: argparse.Namespace, reporter: Reporter) -> None:
    save_figure(show_epochs(args.folder, args.epochs), args.out, grey=True)


def _bench(args: argparse.Namespace, reporter: Reporter) -> None:
    try:
        rows = json.loads(args.file.read_text("utf-8"))["rows"]
        figure = show_bench(rows)
    except (KeyError, TypeError, ValueError) as error:
        raise ScriptError(f"{args.file} is none of scripts.bench's files") from error
    save_figure(figure, args.out, grey=False)


def _sheet(args: argparse.Namespace, reporter: Reporter) -> None:
    drawer = open_drawer(args)
    num_classes, columns = len(drawer.class_names), 10
    y = torch.arange(num_classes).repeat_interleave(columns)  # (N,) a row a digit
    index = torch.arange(columns).repeat(num_classes)  # (N,)
    options = options_from(args, drawer.checkpoint)
    drawer.compile(args.compile, reporter)
    x_0 = drawer.draw(y, index, options, reporter, seed=args.seed, batch_size=args.batch_size)
    save_grid(x_0, args.out, columns=columns, scale=2)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m scripts.plot", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="noise|reverse|losses|epochs|sheet|bench")

    noise = commands.add_parser("noise", help="the forward process: one digit at t = 0, 10, ... 100")
    noise.add_argument("--digit", type=integer(0, 9), default=7, help="default: 7")
    noise.add_argument("--data-dir", type=Path, help="IDX files of MNIST, for a real digit instead of a drawn one")
    reverse = commands.add_parser("reverse", help="the reverse process: ten digits from static, step by step")
    sheet = commands.add_parser("sheet", help="ten images of each digit")
    for command, run in ((noise, _noise), (reverse, _reverse), (sheet, _sheet)):
        add_drawing_arguments(command, seed=0, without=() if run is _sheet else ("--batch-size",))
        command.set_defaults(run=run)

    losses = commands.add_parser("losses", help="training and validation loss by epoch")
    losses.add_argument("runs", type=Path, nargs="+", help="folders of runs, or their losses.csv")
    losses.set_defaults(run=_losses)
    epochs = commands.add_parser("epochs", help="the same digits after several epochs of a run")
    epochs.add_argument("folder", type=Path, help="folder of the run")
    epochs.add_argument("--epochs", type=integer(1), nargs="+", help="default: 1 5 15 30, or the last")
    epochs.set_defaults(run=_epochs)
    bench = commands.add_parser("bench", help="what scripts.bench measured")
    bench.add_argument("file", type=Path, help="its JSON")
    bench.set_defaults(run=_bench)
    for command in (noise, reverse, sheet, losses, epochs, bench):
        command.add_argument("--out", type=file_to_write(".png"), required=True, help="the .png to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
