"""How long a digit is recognised on its way into the fog."""

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
    """Measures recognition of digits at each noise level of a checkpoint's schedule. Writes a figure and its JSON.

    `judge` is a file of weights; None means the shipped ones. Raises CheckpointError or ScriptError.
    """
    schedule = checkpoint.load(path).schedule
    timesteps = list(range(0, schedule.num_steps + 1, max(schedule.num_steps // 50, 1)))
    digits, trained = load_references(split, data_dir).held_out, load_classifier("fog_judge", judge)
    recognised, shares = recognised_in_fog(trained.network, digits, schedule, timesteps, reporter)
    lost = lost_at(timesteps, shares)
    for digit, t in enumerate(lost):
        reporter.line(f"{digit}: {'never lost' if t is None else f'half are lost from t = {t} on'}")
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
    """The share of each digit that is recognised in x_t, and how well it is told, (len(timesteps), 10) both.

    x_t is seen as 8 bits show it, with the same noise at every t. Told is the share that is recognised, less
    the share of other digits that is taken for it (informedness, Youden 1950): whoever calls all static an 8
    recognises every 8, and tells none.
    """
    diffusion = Diffusion(schedule, torch.Generator().manual_seed(0))
    x_0 = from_pixels(digits.images)  # (N, 1, 28, 28)
    eps = torch.randn(x_0.shape, generator=diffusion.generator)
    recognised, told = [], []
    with reporter.task("looking into the fog", len(timesteps), "steps") as task:
        for t in timesteps:
            x_t, _ = diffusion.add_noise(x_0, torch.full((len(x_0),), t), eps)
            seen = recognition(network, Digits(to_pixels(x_t), digits.labels))
            recognised.append(torch.tensor(seen.per_digit))
            told.append(informedness(torch.tensor(seen.confusion)))
            task.advance(1)
    return torch.stack(recognised), torch.stack(told)


def informedness(confusion: Tensor) -> Tensor:
    """[asked][seen] -> for each digit 1 where all are told, 0 where it is guessed, (10,)."""
    counts = confusion.double()  # (10, 10)
    asked, hits = counts.sum(dim=1), counts.diagonal()  # (10,) each
    false_alarms = counts.sum(dim=0) - hits  # (10,)
    return hits / asked - false_alarms / (counts.sum() - asked)


def lost_at(timesteps: list[int], shares: Tensor, share: float = 0.5) -> list[int | None]:
    """For each digit the first t at which it is told less well than `share`; None where it never is."""
    below = (shares < share).T  # (10, K)
    return [timesteps[int(lost.int().argmax())] if lost.any() else None for lost in below]


def show_fog(timesteps: list[int], shares: Tensor) -> "Figure":
    """A line a digit; guessing is at 0."""
    figure = new_figure(760, 420)
    axes = figure.add_subplot()
    for digit in range(NUM_CLASSES):
        axes.plot(timesteps, shares[:, digit].tolist(), f"C{digit}", linewidth=1.2, label=str(digit))
    axes.axhline(0, color="grey", linestyle=":", linewidth=1, label="guessing")
    axes.set_xlabel("t")
    axes.set_ylabel("recognised from $x_t$, less false alarms")
    axes.set_xlim(timesteps[0], timesteps[-1])
    axes.set_ylim(-0.05, 1.02)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    return finish_curves(figure, fontsize=8, ncols=2)
