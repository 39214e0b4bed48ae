"""How far a set of images is from real ones, and whether it covers them: computed from features.

Fréchet distance: Heusel 2017, eq. 6. Precision and recall: Kynkäänniemi 2019; coverage: Naeem 2020.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from scripts.common.mnist import NUM_CLASSES
from scripts.common.progress import require
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
    metric = require("torchmetrics.image.fid", extra="evaluate").FrechetInceptionDistance(_Features(features.shape[1]))
    metric.update(real.double(), real=True)
    metric.update(features.double(), real=False)
    return float(metric.compute())


@dataclass(frozen=True, slots=True)
class Manifold:
    """Shares between 0 and 1, means over the digits; beside them those of each digit."""

    precision: float  # of the images that lie among real ones
    recall: float  # of the real images that lie among these
    coverage: float  # of the real images that have one of these nearby
    per_digit: dict[str, list[float]]  # name of a share -> that of 0, of 1, ... of 9


def compare_manifolds(features: Tensor, labels: Tensor, real: Tensor, real_labels: Tensor) -> Manifold:
    """Returns precision, recall and coverage of features (N, F) against `real` (M, F), digit by digit.

    The labels are (N,) and (M,). For each digit the first images of both sets are compared, in equal numbers.
    """
    shares = []
    for digit in range(NUM_CLASSES):
        ours, theirs = features[labels == digit], real[real_labels == digit]
        count = min(len(ours), len(theirs))
        shares.append(_shares(ours[:count], theirs[:count]))
    per_digit = {name: list(each) for name, each in zip(MANIFOLD, zip(*shares, strict=True), strict=True)}
    means = {name: sum(each) / NUM_CLASSES for name, each in per_digit.items()}
    return Manifold(**means, per_digit=per_digit)


def _shares(features: Tensor, real: Tensor) -> list[float]:
    """Returns precision, recall (Kynkäänniemi 2019, eq. 2) and coverage (Naeem 2020, eq. 4) of features (N, F)."""
    features, real = features.double(), real.double()
    radii = _radii(features, NEAREST_PRECISION)  # (N,)
    real_radii, real_coverage_radii = _radii(real, NEAREST_PRECISION), _radii(real, NEAREST_COVERAGE)  # (M,) each
    is_near_real, recalled, covered = torch.zeros(len(features), dtype=torch.bool), [], []  # (N,)
    for rows in torch.arange(len(real)).split(DISTANCE_ROWS):
        distances = _distances(real[rows], features)  # (B, N)
        is_near_real |= (distances < real_radii[rows, None]).any(dim=0)
        recalled.append((distances < radii).any(dim=1))
        covered.append(distances.amin(dim=1) < real_coverage_radii[rows])
    return [share.double().mean().item() for share in (is_near_real, torch.cat(recalled), torch.cat(covered))]


def _radii(features: Tensor, k: int) -> Tensor:
    """Returns the distance of each of the features (N, F) to its k-th nearest neighbour, (N,)."""
    # The nearest neighbour is the row itself.
    return torch.cat([_distances(rows, features).kthvalue(k + 1).values for rows in features.split(DISTANCE_ROWS)])


def _distances(rows: Tensor, others: Tensor) -> Tensor:
    """Returns the Euclidean distances (B, N), from differences: a matrix product would lose precision."""
    return torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist")


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
