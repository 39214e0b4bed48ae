"""How far a set of images is from real ones, and whether it covers them: computed from features.

Fréchet distance: Heusel 2017, eq. 6. Precision and recall: Kynkäänniemi 2019; coverage: Naeem 2020.
"""

import contextlib
import io
from dataclasses import dataclass

import joblib
import torch
from prdc import compute_prdc
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from scripts.common.mnist import NUM_CLASSES
from scripts.evaluation.tables import MANIFOLD

NEAREST_PRECISION = 3  # neighbours that make the manifold of precision and recall,
NEAREST_COVERAGE = 5  # and the balls of coverage: the papers' own choices
DISTANCE_ROWS = 500  # images compared with all others at once


class _Features(torch.nn.Module):
    """For torchmetrics, which would extract features itself: they are given to it."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(features: Tensor, real: Tensor) -> float:
    """Between two sets of features (N, F) and (M, F), as if both were normally distributed."""
    metric = FrechetInceptionDistance(_Features(features.shape[1]))
    metric.update(real.double(), real=True)
    metric.update(features.double(), real=False)
    return metric.compute().item()


@dataclass(frozen=True, slots=True)
class Manifold:
    """Shares between 0 and 1, means over the digits; beside them those of each digit."""

    precision: float  # of the images that lie among real ones
    recall: float  # of the real images that lie among these
    coverage: float  # of the real images that have one of these nearby
    per_digit: dict[str, list[float]]  # name of a share -> that of 0, of 1, ... of 9


def compare_manifolds(features: Tensor, labels: Tensor, real: Tensor, real_labels: Tensor) -> Manifold:
    """Digit by digit, as many images as real ones: features (N, F) and (M, F), labels (N,) and (M,)."""
    shares = []
    for digit in range(NUM_CLASSES):
        ours, theirs = features[labels == digit].numpy(), real[real_labels == digit].numpy()
        count = min(len(ours), len(theirs))
        # It prints what it was given; and its threads would empty each other's warning filters.
        with contextlib.redirect_stdout(io.StringIO()), joblib.parallel_config("sequential"):
            near = compute_prdc(theirs[:count], ours[:count], NEAREST_PRECISION)
            wide = compute_prdc(theirs[:count], ours[:count], NEAREST_COVERAGE)
        shares.append([near["precision"], near["recall"], wide["coverage"]])
    per_digit = {name: list(each) for name, each in zip(MANIFOLD, zip(*shares, strict=True), strict=True)}
    means = {name: sum(each) / NUM_CLASSES for name, each in per_digit.items()}
    return Manifold(**means, per_digit=per_digit)


@dataclass(frozen=True, slots=True)
class Nearest:
    """For each image the two nearest of those that were learned from, by the distance of their pixels."""

    distances: Tensor  # (N, 2), nearest first, of pixels in [0, 1]
    indices: Tensor  # (N, 2)

    @property
    def ratio(self) -> Tensor:
        """How much nearer the nearest is than the second, (N,); below 1/3 counts as memorised (Yoon 2023)."""
        return self.distances[:, 0] / self.distances[:, 1].clamp(min=1e-12)


def nearest_learned(images: Tensor, learned: Tensor) -> Nearest:
    """images and learned uint8 (N, 1, H, W) and (M, 1, H, W)."""
    ours, theirs = images.flatten(1).float() / 255, learned.flatten(1).float() / 255
    found = [torch.cdist(rows, theirs).topk(2, dim=1, largest=False) for rows in ours.split(DISTANCE_ROWS)]
    return Nearest(torch.cat([f.values for f in found]), torch.cat([f.indices for f in found]))


def memorised_share(nearest: Nearest, threshold: float = 1 / 3) -> float:
    """The share of images that are far nearer to one learned image than to any other."""
    return (nearest.ratio < threshold).double().mean().item()
