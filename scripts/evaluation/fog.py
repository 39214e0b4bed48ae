"""Measures up to which noise level of the forward process a digit can be recognised."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model import checkpoint
from model.diffusion import Diffusion
from model.files import write_json
from model.pixels import from_pixels, to_pixels
from model.schedule import Schedule
from scripts.common.figures import finish_curves, new_figure, save_figure
from scripts.common.mnist import NUM_CLASSES
from scripts.common.progress import Reporter
from scripts.evaluation.classifiers import Classifier, load_classifier
from scripts.evaluation.recognition import recognition
from scripts.evaluation.samples import Digits, load_references

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    save_figure(show_fog(timesteps, shares), out, grey=False)
    content = {
        "split": split,
        "judge": {"sha256": trained.sha256, "test_accuracy": trained.accuracy},
        "t": timesteps,
        "recognised": recognised.T.tolist(),
        "told": shares.T.tolist(),
        "half_lost_at": lost,
    }
    write_json(out.with_suffix(".json"), content)


def recognised_in_fog(
    network: Classifier, digits: Digits, schedule: Schedule, timesteps: list[int], reporter: Reporter
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
            seen = recognition(network, Digits(to_pixels(x_t), digits.labels))
            recognised.append(torch.tensor(seen.per_digit))
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


def show_fog(timesteps: list[int], shares: Tensor) -> "Figure":
    """Plots the informedness of each digit by timestep."""
    figure = new_figure(760, 420)
    axes = figure.add_subplot()
    for digit in range(NUM_CLASSES):
        axes.plot(timesteps, shares[:, digit].tolist(), f"C{digit}", linewidth=1.2, label=str(digit))
    axes.axhline(0, color="grey", linestyle=":", linewidth=1, label="guessing")
    axes.set_xlabel("t")
    axes.set_ylabel("recognised in $x_t$, minus false alarms")
    axes.set_xlim(timesteps[0], timesteps[-1])
    axes.set_ylim(-0.05, 1.02)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    return finish_curves(figure, fontsize=8, ncols=2)
