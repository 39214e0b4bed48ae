"""Figures of the forward process, the reverse process, generated digits and training runs."""

import csv
import os
import re
from collections.abc import Sequence
from dataclasses import replace
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
from scripts.common.drawing import Drawer, DrawingOptions, DrawingRequest, open_drawer, options_from
from scripts.common.errors import ScriptError
from scripts.common.figures import Panel, draw_panels, finish_curves, new_figure, plain, save_figure
from scripts.common.mnist import load_mnist
from scripts.common.pictures import GRID_COLUMNS, grid, save_grid
from scripts.common.progress import Reporter, require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

USUAL_EPOCHS = (1, 5, 15, 30)
SCALES = (1, 1.5, 2, 3, 4, 5, 6, 8, 10)  # guidance scales; 1 means off
ROW_GAP = 4  # white pixels between the rows of two epochs
NUM_NOISE_COLUMNS = 11  # t = 0, 10, ... 100
Losses = dict[str, list[float]]  # column -> one value for each epoch


def show_noise_progression(x_0: Tensor, schedule: Schedule, *, seed: int = 0) -> "Figure":
    """Returns a figure of one image (C, H, W) in [-1, 1] at t = 0, T/10, ..., T, with the same noise at each t."""
    diffusion = Diffusion(schedule, torch.Generator().manual_seed(seed))
    t = torch.linspace(0, schedule.num_steps, NUM_NOISE_COLUMNS).round().long()
    eps = torch.randn(x_0.shape, generator=diffusion.generator).expand(len(t), *x_0.shape)
    x_t, _ = diffusion.add_noise(x_0.expand_as(eps), t, eps)  # (11, C, H, W)
    labels = [f"t = {step}" for step in t.tolist()]
    return draw_panels([Panel(grid(x_t, len(t)), labels)], scale=3)


def show_reverse_process(drawer: Drawer, options: DrawingOptions, reporter: Reporter, *, seed: int) -> "Figure":
    """Returns a figure of the reverse process for all digits, from the same noise: x_t and the predicted x_0."""
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
    """Returns `wanted` evenly spaced integers from 0 to count - 1, including both ends.

    Returns all integers if count is smaller than `wanted`.
    """
    wanted = min(wanted, count)
    return [round(i * (count - 1) / max(wanted - 1, 1)) for i in range(wanted)]


def show_losses(losses: dict[str, Losses]) -> "Figure":
    """Returns a figure of the training and validation losses per epoch. Each run has its own colour."""
    figure = new_figure(760, 400)
    axes = figure.add_subplot()
    for i, (name, columns) in enumerate(losses.items()):
        epoch = columns["epoch"]
        marker = "." if len(epoch) < 3 else None
        axes.plot(epoch, columns["train_loss"], f"C{i}--", marker=marker, linewidth=1, label=f"{plain(name)}, training")
        axes.plot(epoch, columns["validation_loss"], f"C{i}-", marker=marker, label=f"{plain(name)}, validation")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.xaxis.set_major_locator(require("matplotlib.ticker").MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    axes.tick_params(which="both", labelsize=8)
    return finish_curves(figure)


def read_losses(path: Path) -> Losses:
    """Reads the losses.csv of a run. `path` is the file or the run folder.

    Raises ScriptError if the file is missing, has no epoch or is not a losses.csv.
    """
    path = path / "losses.csv" if path.is_dir() else path
    try:
        rows = list(csv.DictReader(path.read_text().splitlines()))
        names = ("epoch", "train_loss", "validation_loss")
        columns = {name: [float(row[name]) for row in rows] for name in names}
    except OSError as error:
        raise ScriptError(f"{path} cannot be read: {error.strerror}") from error
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise ScriptError(f"{path} is not the losses.csv of a run of scripts.train") from error
    if not rows:
        raise ScriptError(f"{path} has no epoch yet. Wait until the first epoch has finished")
    return columns


def show_epochs(run: Path, epochs: Sequence[int] | None = None) -> "Figure":
    """Returns a figure of the same images after several epochs, with one row per epoch.

    The default epochs are 1, 5, 15 and 30. The last epoch of the run replaces those that are beyond it.
    Raises ScriptError if the run does not have a requested epoch.
    """
    folder = run / "epochs"
    available = sorted(int(path.stem) for path in folder.glob("*.png") if re.fullmatch(r"\d+", path.stem))
    if not available:
        raise ScriptError(f"{folder} has no image of an epoch. Use the run folder of scripts.train")
    epochs = epochs or sorted({min(epoch, available[-1]) for epoch in USUAL_EPOCHS})
    missing = sorted(set(epochs) - set(available))
    if missing:
        raise ScriptError(f"{folder} has no image of epoch {missing[0]}. The last epoch is {available[-1]}")
    grids = []
    for epoch in epochs:
        with Image.open(folder / f"{epoch:02d}.png") as image:
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, -1)
            grids.append(F.pad(pixels, (0, 0, 0, 0, 0, ROW_GAP), value=255))  # (H, W, C)
    if len({pixels.shape for pixels in grids}) > 1:
        raise ScriptError(f"the images in {folder} have different sizes, so they are from different runs")
    labels = [f"epoch {epoch}" for epoch in epochs]
    return draw_panels([Panel(torch.cat(grids), columns_of(run), labels)], scale=1)


def columns_of(run: Path) -> Sequence[str]:
    """Returns the class of each column in the images of the epochs. Empty if a column has several classes."""
    try:
        names = checkpoint.read_config(run / "model.safetensors").class_names
    except checkpoint.CheckpointError:  # The images are of a run that lost its checkpoint, and may be of any classes.
        return ()
    return names if len(names) <= GRID_COLUMNS else ()


def plot_drawn_noise(request: DrawingRequest, digit: int, out: Path, reporter: Reporter) -> None:
    """Writes a figure of the forward process of a generated digit."""
    y, drawer = torch.tensor([digit]), open_drawer(request)
    options, schedule = options_from(request, drawer.checkpoint), drawer.checkpoint.schedule
    drawer.compile(request.compile, reporter)
    x_0 = drawer.draw(y, torch.zeros_like(y), options, reporter, seed=request.seed)[0]  # (C, H, W)
    save_figure(show_noise_progression(x_0, schedule, seed=request.seed), out, grey=True)


def plot_real_noise(path: Path, data_dir: Path, digit: int, out: Path, *, seed: int) -> None:
    """Writes a figure of the forward process of MNIST's first test image of the digit.

    `path` is the checkpoint whose noise schedule is used.
    """
    images, labels = load_mnist("test", data_dir)
    x_0, schedule = from_pixels(images[labels == digit][0]), checkpoint.load(path).schedule
    save_figure(show_noise_progression(x_0, schedule, seed=seed), out, grey=True)


def plot_reverse(request: DrawingRequest, out: Path, reporter: Reporter) -> None:
    """Writes a figure of the reverse process of all digits."""
    drawer = open_drawer(request)
    options = options_from(request, drawer.checkpoint)
    drawer.compile(request.compile, reporter)
    save_figure(show_reverse_process(drawer, options, reporter, seed=request.seed), out, grey=True)


def plot_losses(runs: Sequence[Path], out: Path) -> None:
    """Writes a figure of the losses of several runs. A run is a run folder or a losses.csv."""
    folders = {(path.parent if path.suffix == ".csv" else path).resolve().name: path for path in runs}
    # The name of a folder can be any bytes.
    losses = {os.fsencode(name).decode(errors="backslashreplace"): read_losses(folders[name]) for name in folders}
    save_figure(show_losses(losses), out, grey=False)


def plot_epochs(run: Path, epochs: Sequence[int] | None, out: Path) -> None:
    """Writes a figure with the digits of several epochs of a run, one row per epoch."""
    figure = show_epochs(run, epochs)
    save_figure(figure, out, grey=False, colours=256)


def plot_sheet(request: DrawingRequest, out: Path, reporter: Reporter, *, data_dir: Path | None = None) -> None:
    """Writes one PNG with ten images of each digit, one row per digit.

    With `data_dir`, the folder of MNIST's IDX files, ten real test digits of each class are shown to the right.
    """
    drawer = open_drawer(request)
    num_classes, columns = len(drawer.class_names), 10
    y = torch.arange(num_classes).repeat_interleave(columns)  # (N,) one row for each digit
    index = torch.arange(columns).repeat(num_classes)  # (N,)
    options = options_from(request, drawer.checkpoint)
    drawer.compile(request.compile, reporter)
    x_0 = drawer.draw(y, index, options, reporter, seed=request.seed, batch_size=request.batch_size)
    if data_dir is None:
        save_grid(x_0, out, columns=columns, scale=2)
        return
    images, labels = load_mnist("test", data_dir)
    real = torch.cat([images[labels == digit][:columns] for digit in range(num_classes)])  # (N, 1, 28, 28)
    panels = [
        Panel(grid(x_0, columns), (), drawer.class_names, "generated"),
        Panel(grid(from_pixels(real), columns), (), title="real test digits of MNIST"),
    ]
    save_figure(draw_panels(panels, scale=1), out, grey=True)


def plot_guidance(request: DrawingRequest, out: Path, reporter: Reporter) -> None:
    """Writes all digits from the same noise with each of SCALES as guidance scale, one row per digit."""
    drawer = open_drawer(request)
    drawer.compile(request.compile, reporter)
    y = torch.arange(len(drawer.class_names))
    columns = []
    for scale in SCALES:
        options = options_from(replace(request, guidance_scale=scale), drawer.checkpoint)
        columns.append(drawer.draw(y, torch.zeros_like(y), options, reporter, seed=request.seed))
    x_0 = rearrange(columns, "scale digit c h w -> (digit scale) c h w")
    panel = Panel(grid(x_0, len(SCALES)), [f"{scale:g}" for scale in SCALES], drawer.class_names, "guidance scale")
    save_figure(draw_panels([panel], scale=1), out, grey=True)
