"""Metrics that compare generated with real images.

Fréchet distance (Heusel 2017, eq. 6), precision and recall (Kynkäänniemi 2019) and coverage (Naeem 2020) use features.
The share of memorised images (Yoon 2023) uses pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from scripts.common.data.data_set import digest_of
from scripts.common.progress import require
from scripts.evaluation.tables import MANIFOLD

NEAREST_PRECISION = 3  # neighbours for precision and recall, as in the paper
NEAREST_COVERAGE = 5  # neighbours for coverage, as in the paper
FEWEST_COMPARED = NEAREST_COVERAGE + 1  # images of a class
DISTANCE_ROWS = 500  # rows of the distance matrix in memory


class _Features(torch.nn.Module):
    """An identity network, so that torchmetrics accepts features instead of images."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(features: Tensor, real: Tensor) -> float:
    """Returns the distance of the normal distributions fitted to features (N, F) and to `real` (M, F)."""
    metric = require("torchmetrics.image.fid", extra="evaluate").FrechetInceptionDistance(_Features(features.shape[1]))
    metric.update(real.double(), real=True)
    metric.update(features.double(), real=False)
    return float(metric.compute())


@dataclass(frozen=True, slots=True)
class Manifold:
    """Precision, recall and coverage between 0 and 1, as means over the classes and for each class."""

    precision: float  # share of generated images within the manifold of the real images
    recall: float  # share of real images within the manifold of the generated images
    coverage: float  # share of real images with a generated image in their neighbourhood
    per_class: dict[str, list[float]]  # name of the metric -> value of each class


def compare_manifolds(features: Tensor, labels: Tensor, real: Tensor, real_labels: Tensor) -> Manifold:
    """Returns precision, recall and coverage of features (N, F) compared with `real` (M, F), for each class.

    The labels are (N,) and (M,). For each class, both sets are cut to the number of images of the smaller set.
    """
    shares, num_classes = [], int(real_labels.max()) + 1
    for label in range(num_classes):
        ours, theirs = features[labels == label], real[real_labels == label]
        count = min(len(ours), len(theirs))
        shares.append(_shares(ours[:count], theirs[:count]))
    per_class = {name: list(each) for name, each in zip(MANIFOLD, zip(*shares, strict=True), strict=True)}
    means = {name: sum(each) / num_classes for name, each in per_class.items()}
    return Manifold(**means, per_class=per_class)


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
    # k + 1, since the nearest neighbour is the row itself.
    return torch.cat([_distances(rows, features).kthvalue(k + 1).values for rows in features.split(DISTANCE_ROWS)])


def _distances(rows: Tensor, others: Tensor) -> Tensor:
    """Returns the Euclidean distances (B, N), without matrix products, which would lose precision."""
    return torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist")


@dataclass(frozen=True, slots=True)
class Nearest:
    """The two nearest training images of each image, by Euclidean distance of the pixels."""

    distances: Tensor  # (N, 2), nearest first, for pixels in [0, 1]
    indices: Tensor  # (N, 2), indices of the training images

    @property
    def ratio(self) -> Tensor:
        """The nearest distance divided by the second nearest, (N,). Below 1/3 counts as memorised (Yoon 2023)."""
        return self.distances[:, 0] / self.distances[:, 1].clamp(min=1e-12)


def nearest_learned(images: Tensor, learned: Tensor, *, flip: bool = False) -> Nearest:
    """Finds the nearest training images, `learned` (M, C, H, W), of `images` (N, C, H, W), both uint8.

    Equal training images count as one. Otherwise the second nearest of a copy would be as near as the nearest. With
    `flip`, the distance to a training image is the smaller one of those to it and to its mirror image. If all training
    images are equal, the second nearest is infinitely far.
    """
    first_rows = dict[bytes, int]()
    for row, image in enumerate(learned):
        first_rows.setdefault(digest_of(image), row)
    distinct = torch.tensor([*first_rows.values()])  # (U,)
    theirs = learned[distinct].flatten(1).float() / 255  # (U, C * H * W)
    nearest = torch.full((len(images), 2), torch.inf), torch.zeros((len(images), 2), dtype=torch.int64)
    for rows in torch.arange(len(images)).split(DISTANCE_ROWS):
        views = [images[rows], images[rows].flip(-1)] if flip else [images[rows]]
        distances = [torch.cdist(view.flatten(1).float() / 255, theirs) for view in views]  # (B, U) each
        found = torch.stack(distances).amin(dim=0).topk(min(2, len(theirs)), dim=1, largest=False)
        for to, values in zip(nearest, (found.values, distinct[found.indices]), strict=True):
            to[rows, : values.shape[1]] = values
    return Nearest(*nearest)


def memorised_share(nearest: Nearest, threshold: float = 1 / 3) -> float:
    """Returns the share of images that are much nearer to one training image than to any other."""
    return (nearest.ratio < threshold).double().mean().item()
