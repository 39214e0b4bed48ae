"""Measures the search for the digit of a noisy image: its accuracy, and the calibration of its probabilities."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from model.noisy_image import WHITE, NoisyComparison, can_compare, comparison_path, matching_timestep
from model.paths import noise_above
from model.process import Start, compare
from model.recognition import RECOGNITION_SEED
from model.sampler import plan_through
from model.schedule import Schedule
from model.step import Step
from scripts.common.mnist import NUM_CLASSES
from scripts.evaluation.recognize import calibration_error

SEARCH_LEVELS = (20, 35, 50, 60, 65, 70, 75, 80)  # timesteps whose noise levels are evaluated
NUM_BINS = 10  # of the calibration error
SEARCH_COLUMNS = ("noise", "t", "accuracy", "log loss", "calibration error", "true digit")


def search(step: Step, schedule: Schedule, u: Tensor, noise_std: Sequence[float]) -> list[NoisyComparison | None]:
    """Compares the classes of images u (B, 1, 28, 28) from `restored_image`. u is on the device of `step`.

    The result is None for an image whose noise is too strong. Each image must have noise.
    """
    t = [matching_timestep(schedule, std) for std in noise_std]
    known = [i for i, level in enumerate(t) if can_compare(schedule, level)]
    found = {i: NoisyComparison(NUM_CLASSES, noise_std[i]) for i in known}
    if known:
        paths, u = [comparison_path(schedule, t[i]) for i in known], u[known]
        levels = torch.tensor([noise_above(schedule, *path[:2]) for path in paths], device=u.device)  # (B, 2)
        start = Start(u, levels[:, 0], levels[:, 1], torch.ones_like(u, dtype=torch.bool))
        plans = [plan_through(schedule, "noisy", path) for path in paths]
        seed = torch.full((len(u),), RECOGNITION_SEED, device=u.device)
        compare(step, plans, list(found.values()), seed=seed, index=torch.zeros_like(seed), start=start)
    return [found.get(i) for i in range(len(t))]


def search_figures(found: Sequence[NoisyComparison], labels: Tensor) -> dict[str, float]:
    """Returns accuracy and calibration of the searches in images of digits with labels (N,)."""
    probabilities = torch.tensor([each.probabilities for each in found], dtype=torch.float64)  # (N, C)
    is_right = torch.tensor([each.label for each in found]) == labels  # (N,)
    of_digit = probabilities.gather(1, labels[:, None])[:, 0]  # (N,)
    return {
        "accuracy": is_right.double().mean().item(),
        "log_loss": -of_digit.clamp(min=1e-12).log().mean().item(),
        "calibration_error": calibration_error(probabilities.amax(dim=1), is_right, NUM_BINS),
        "of_true_digit": of_digit.mean().item(),
    }


def as_search_row(row: dict[str, float]) -> list[str]:
    """Returns the cells of SEARCH_COLUMNS."""
    return [
        f"{row['noise_std']:.0f}",
        f"{row['t']}",
        f"{row['accuracy']:.1%}",
        f"{row['log_loss']:.3f}",
        f"{row['calibration_error']:.1%}",
        f"{row['of_true_digit']:.1%}",
    ]


def fit_probabilities(found: Sequence[Sequence[NoisyComparison]], labels: Tensor) -> tuple[float, float]:
    """Fits ODDS_SCALE and PREDICTION_VARIANCE of `model.denoising` to the searches at several noise levels.

    found[i] has one comparison for each image at level i. labels is (N,). The loss is the mean negative
    log-likelihood over all images. The parameters of the fit are the logarithms of both constants.
    """
    sums = torch.tensor([[each.estimated_sums for each in level] for level in found], dtype=torch.float64)  # (L, N, C)
    sigma = torch.tensor([level[0].noise_std / (WHITE / 2) for level in found], dtype=torch.float64)  # (L,)
    logs = torch.tensor([math.log(0.05), 0.0], dtype=torch.float64, requires_grad=True)  # (2,)
    optimiser = torch.optim.LBFGS([logs], max_iter=200, line_search_fn="strong_wolfe")
    gaps = sums - sums.amin(dim=2, keepdim=True)  # (L, N, C)

    def loss() -> Tensor:
        optimiser.zero_grad()
        scale, variance = logs.exp()
        k = scale / (sigma.square() + variance)  # (L,)
        log_p = (-k[:, None, None] * gaps).log_softmax(dim=2)  # (L, N, C)
        total = nll_loss(log_p.flatten(0, 1), labels.repeat(len(found)))
        total.backward()
        return total

    optimiser.step(loss)
    scale, variance = logs.detach().exp().tolist()
    return scale, variance
