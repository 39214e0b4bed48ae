"""Measures up to which noise level of the forward process a digit can be recognised."""

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model import checkpoint
from model.diffusion import Diffusion
from model.files import write_json
from model.pixels import from_pixels, to_pixels
from model.schedule import Schedule
from scripts.common.data.data_set import ImageSet
from scripts.common.figures import LABEL_SIZE, finish_curves, new_figure, save_figure
from scripts.common.mnist import NUM_CLASSES
from scripts.common.progress import Reporter, require
from scripts.evaluation.classifiers import Classifier, load_classifier
from scripts.evaluation.recognition import recognition
from scripts.evaluation.samples import load_references

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN_FROM = 0.4  # fraction of the timesteps where the plot starts; every digit is recognised before it
LABELS_FROM, LABELS_TO = 0.85, 0.15  # heights of the labels of the first and the last line


def evaluate_fog(path: Path, judge: Path | None, out: Path, reporter: Reporter, *, split: str, data_dir: Path) -> None:
    """Measures recognition of real digits at each noise level of a checkpoint's schedule. Writes a plot and JSON.

    `judge` is a file with weights. None means the shipped ones. Raises CheckpointError or ScriptError.
    """
    schedule = checkpoint.load(path).schedule
    timesteps = list(range(0, schedule.num_steps + 1, max(schedule.num_steps // 50, 1)))
    digits, trained = load_references(split, data_dir).held_out, load_classifier("fog_judge", judge)
    recognised, shares = recognised_in_fog(trained.network, digits, schedule, timesteps, reporter)
    lost = lost_at(timesteps, shares)
    for digit, t in enumerate(lost):
        when = "never" if t is None else f"at t = {t}"
        reporter.line(f"{digit}: informedness falls below 50% {when}")
    counts = torch.bincount(digits.labels, minlength=NUM_CLASSES)  # (10,)
    error = standard_error(recognised, shares, counts)
    save_figure(show_fog(timesteps, shares, error), out, grey=False)
    content = {
        "split": split,
        "judge": {"sha256": trained.sha256, "test_accuracy": trained.accuracy},
        "t": timesteps,
        "recognised": recognised.T.tolist(),
        "told": shares.T.tolist(),
        "half_lost_at": lost,
        "counts": counts.tolist(),
    }
    write_json(out.with_suffix(".json"), content)


def recognised_in_fog(
    network: Classifier, digits: ImageSet, schedule: Schedule, timesteps: list[int], reporter: Reporter
) -> tuple[Tensor, Tensor]:
    """Returns the share of each digit that is recognised in x_t, and its informedness, both (len(timesteps), 10).

    Informedness (Youden 1950) is the share that is recognised minus the share of other digits recognised as this digit.
    It is 0 for a classifier that always answers 8, although this recognises every 8. x_t is rounded to 8 bits. The
    noise is the same for every t.
    """
    diffusion = Diffusion(schedule, torch.Generator().manual_seed(0))
    x_0 = from_pixels(digits.images)  # (N, 1, 28, 28)
    eps = torch.randn(x_0.shape, generator=diffusion.generator)
    recognised, informed = [], []
    with reporter.task("recognising noisy digits", len(timesteps), "timesteps") as task:
        for t in timesteps:
            x_t, _ = diffusion.add_noise(x_0, torch.full((len(x_0),), t), eps)
            seen = recognition(network, ImageSet(to_pixels(x_t), digits.labels))
            recognised.append(torch.tensor(seen.per_class))
            informed.append(informedness(torch.tensor(seen.confusion)))
            task.advance(1)
    return torch.stack(recognised), torch.stack(informed)


def informedness(confusion: Tensor) -> Tensor:
    """Returns the informedness (10,) of counts [digit][recognised as]. 1 is perfect, 0 is guessing."""
    counts = confusion.double()  # (10, 10)
    asked, hits = counts.sum(dim=1), counts.diagonal()  # (10,) each
    false_alarms = counts.sum(dim=0) - hits  # (10,)
    return hits / asked - false_alarms / (counts.sum() - asked)


def lost_at(timesteps: list[int], shares: Tensor, share: float = 0.5) -> list[int | None]:
    """Returns the first t of each digit with an informedness below `share`, or None."""
    below = (shares < share).T  # (10, K)
    return [timesteps[int(lost.int().argmax())] if lost.any() else None for lost in below]


def standard_error(recognised: Tensor, informed: Tensor, counts: Tensor) -> Tensor:
    """Returns the standard error of the informedness (K, 10), given the number of digits of each class (10,)."""
    hits, false_alarms = recognised, recognised - informed  # (K, 10) each
    others = counts.sum() - counts  # (10,)
    variance = hits * (1 - hits) / counts + false_alarms * (1 - false_alarms) / others  # (K, 10)
    return variance.clamp(min=0).sqrt()


def show_fog(timesteps: list[int], informed: Tensor, error: Tensor) -> "Figure":
    """Plots the informedness of each digit by timestep, with bands of two standard errors. Both are (K, 10)."""
    figure = new_figure(760, 420)
    axes = figure.add_subplot()
    colours = require("matplotlib").colormaps["tab10"].colors
    by_loss = informed.sum(dim=0).argsort().tolist()  # sorted by the noise level at which digits become unrecognisable
    for place, digit in enumerate(by_loss):
        line, band = informed[:, digit], 2 * error[:, digit]  # (K,) each
        axes.plot(timesteps, line.tolist(), color=colours[digit], linewidth=1.3)
        axes.fill_between(timesteps, (line - band).tolist(), (line + band).tolist(), color=colours[digit], alpha=0.15)
        height = LABELS_FROM + (LABELS_TO - LABELS_FROM) * place / (NUM_CLASSES - 1)
        _label(axes, str(digit), _crossing(timesteps, line.tolist(), height), height, colours[digit])
    axes.axhline(0, color="grey", linestyle=":", linewidth=1)
    axes.text(SHOWN_FROM * timesteps[-1], 0.015, " guessing", color="grey", fontsize=LABEL_SIZE)
    axes.set_xlabel("timestep t (0: image, 100: noise)" if timesteps[-1] == 100 else "timestep t")
    axes.set_ylabel("recognised in $x_t$, minus false alarms")
    axes.set_xlim(SHOWN_FROM * timesteps[-1], timesteps[-1])
    axes.set_ylim(-0.05, 1.02)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    return finish_curves(figure)


def _crossing(timesteps: list[int], line: list[float], height: float) -> float:
    """Returns the timestep at which a falling line reaches a height; the last timestep if it stays above."""
    for (t, above), (u, below) in pairwise(zip(timesteps, line, strict=True)):
        if above >= height > below:
            return t + (u - t) * (above - height) / (above - below)
    return timesteps[-1]


def _label(axes: "Axes", text: str, x: float, y: float, colour: object) -> None:
    box = {"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": "none"}
    axes.text(x, y, text, color=colour, ha="center", va="center", fontsize=LABEL_SIZE, fontweight="bold", bbox=box)
