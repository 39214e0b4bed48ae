"""How long a digit is recognised on its way into the fog."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.diffusion import Diffusion
from model.schedule import Schedule
from scripts.evaluation.classifiers import NUM_CLASSES, Classifier
from scripts.evaluation.quality import recognition
from scripts.evaluation.samples import Digits
from scripts.figures import new_figure
from scripts.mnist import to_model_range
from scripts.pictures import to_pixels
from scripts.progress import Reporter

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def recognised_in_fog(
    network: Classifier, digits: Digits, schedule: Schedule, timesteps: list[int], reporter: Reporter
) -> Tensor:
    """The share of each digit that is recognised from x_t, (len(timesteps), 10), the same noise at every t."""
    diffusion = Diffusion(schedule, torch.Generator().manual_seed(0))
    x_0 = to_model_range(digits.images)  # (N, 1, 28, 28)
    eps = torch.randn(x_0.shape, generator=diffusion.generator)
    shares = []
    with reporter.task("looking into the fog", len(timesteps), "steps") as task:
        for t in timesteps:
            x_t, _ = diffusion.add_noise(x_0, torch.full((len(x_0),), t), eps)
            shares.append(recognition(network, Digits(to_pixels(x_t), digits.labels)).per_digit)
            task.advance(1)
    return torch.tensor(shares, dtype=torch.float64)


def lost_at(timesteps: list[int], shares: Tensor, share: float = 0.5) -> list[int]:
    """For each digit the first t at which fewer than `share` of its images are recognised; the last t where none is."""
    below = shares < share  # (K, 10)
    first = torch.where(below.any(dim=0), below.int().argmax(dim=0), len(timesteps) - 1)
    return [timesteps[k] for k in first.tolist()]


def show_fog(timesteps: list[int], shares: Tensor) -> "Figure":
    """A line a digit, and the share that guessing would get."""
    figure = new_figure(760, 420)
    axes = figure.add_subplot()
    for digit in range(NUM_CLASSES):
        axes.plot(timesteps, shares[:, digit].tolist(), f"C{digit}", linewidth=1.2, label=str(digit))
    axes.axhline(1 / NUM_CLASSES, color="grey", linestyle=":", linewidth=1, label="guessing")
    axes.set_xlabel("t")
    axes.set_ylabel("recognised from $x_t$")
    axes.set_xlim(timesteps[0], timesteps[-1])
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    figure.tight_layout()
    return figure
