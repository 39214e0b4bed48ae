import numpy as np
import pytest
import scipy.linalg
import torch

from scripts.evaluation import distances
from scripts.evaluation.classifiers import Extractor
from scripts.evaluation.distances import (
    compare_manifolds,
    frechet_distance,
    memorised_share,
    nearest_learned,
)
from scripts.evaluation.tables import FEWEST_IMAGES


def gaussian(count: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(6, 6, generator=generator)
    return torch.randn(count, 6, generator=generator) @ mix * scale


def test_frechet_distance_equals_the_formula_of_the_paper() -> None:
    """Heusel 2017, eq. 6, with the matrix square root of SciPy."""
    ours, real = gaussian(300, 1).numpy().astype(float), gaussian(400, 2, 1.3).numpy().astype(float) + 0.5
    covariances = np.cov(ours.T), np.cov(real.T)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = np.square(ours.mean(0) - real.mean(0)).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    measured = frechet_distance(torch.from_numpy(ours).float(), torch.from_numpy(real).float())
    assert measured == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_of_a_shift_is_the_squared_shift() -> None:
    features = gaussian(200, 3)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(features + 0.25, features) == pytest.approx(6 * 0.25**2, rel=1e-4)


def test_fewest_images_are_enough_to_detect_a_known_frechet_distance() -> None:
    """The distance of normal distributions with equal covariance is |shift|^2. Here it is about that of blurred digits.

    The number of features and their variances (a sum of 30, most of it in few features) are like the extractor's.
    """
    random, features, truth = np.random.default_rng(0), Extractor.num_features, 0.17
    variances = 0.85 ** np.arange(features)
    variances *= 30 / variances.sum()

    def draw(count: int, shift: float = 0.0) -> torch.Tensor:
        drawn = random.standard_normal((count, features)) * np.sqrt(variances)
        return torch.from_numpy(drawn + shift / features**0.5)  # an equal shift in each feature

    real = draw(9_000)

    def estimates(count: int) -> tuple[list[float], list[float]]:
        same, shifted = ([frechet_distance(draw(count, shift), real) for _ in range(4)] for shift in (0, truth**0.5))
        return same, shifted

    assert estimates(50_000)[1] == pytest.approx([truth] * 4, rel=0.3)  # many images give the exact value
    same, shifted = estimates(FEWEST_IMAGES)
    assert min(shifted) > 1.4 * max(same)
    same, shifted = estimates(FEWEST_IMAGES // 5)
    assert min(shifted) < 1.4 * max(same)
    same, _ = estimates(features)
    assert min(same) > 5 * truth  # the true distance is 0


def test_manifold_metrics_are_1_for_the_same_set_and_0_for_a_distant_set() -> None:
    features, labels = gaussian(400, 4), torch.arange(400) % 10
    same = compare_manifolds(features, labels, features, labels)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    far = compare_manifolds(features + 100, labels, features, labels)
    assert (far.precision, far.recall, far.coverage) == (0, 0, 0)


def test_set_with_one_of_two_modes_has_high_precision_and_half_recall() -> None:
    labels = torch.arange(800) % 10
    second = (torch.arange(800) >= 400)[:, None] * 50.0  # half of each digit's real images are elsewhere
    real = gaussian(800, 5) + second
    ours = real[:400].repeat(2, 1) + 0.01
    manifold = compare_manifolds(ours, labels, real, labels)
    assert manifold.precision > 0.95
    assert 0.45 < manifold.recall < 0.55
    assert 0.45 < manifold.coverage < 0.55


@pytest.mark.parametrize("block", [7, 40, 500])
def test_precision_recall_and_coverage_equal_the_formulas_of_the_papers(
    monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """Kynkäänniemi 2019, eq. 2, with k = 3, and Naeem 2020, eq. 4, with k = 5, from all pairs of one digit."""
    monkeypatch.setattr(distances, "DISTANCE_ROWS", block)
    ours, real = gaussian(40, 8).numpy().astype(float), gaussian(40, 9, 1.2).numpy().astype(float)

    def radius(points: np.ndarray, k: int) -> np.ndarray:
        return np.array(
            [np.sort(np.linalg.norm(points - point, axis=1))[k] for point in points]
        )  # index 0 is the point itself

    between = np.linalg.norm(ours[:, None] - real[None], axis=2)  # (ours, real)
    precision = (between < radius(real, 3)).any(axis=1).mean()
    recall = (between < radius(ours, 3)[:, None]).any(axis=0).mean()
    coverage = (between.min(axis=0) < radius(real, 5)).mean()
    assert 0 < min(precision, recall, coverage) <= max(precision, recall, coverage) < 1
    labels = torch.arange(10).repeat_interleave(40)
    features = [torch.from_numpy(points).float().repeat(10, 1) for points in (ours, real)]
    manifold = compare_manifolds(features[0], labels, features[1], labels)
    assert (manifold.precision, manifold.recall, manifold.coverage) == pytest.approx((precision, recall, coverage))


def test_manifold_metrics_compare_each_digit_with_the_same_digit() -> None:
    features, labels = gaussian(400, 7), torch.arange(400) % 10
    apart = features + 100.0 * labels[:, None]
    swapped = compare_manifolds(apart, (labels + 1) % 10, apart, labels)
    assert (swapped.precision, swapped.recall, swapped.coverage) == (0, 0, 0)


def test_manifold_metrics_are_means_over_the_digits() -> None:
    features, labels = gaussian(400, 7), torch.arange(400) % 10
    moved = compare_manifolds(features + 100.0 * (labels == 3)[:, None], labels, features, labels)
    for name in ("precision", "recall", "coverage"):
        each = moved.per_class[name]
        assert [share > 0 for share in each] == [digit != 3 for digit in range(10)]
        assert getattr(moved, name) == pytest.approx(sum(each) / 10)


def test_nearest_training_images_equal_those_of_a_brute_force_search() -> None:
    generator = torch.Generator().manual_seed(0)
    learned = torch.randint(0, 256, (90, 1, 28, 28), generator=generator, dtype=torch.uint8)
    images = torch.randint(0, 256, (7, 1, 28, 28), generator=generator, dtype=torch.uint8)
    images[3] = learned[42]
    nearest = nearest_learned(images, learned)
    for image, indices, found in zip(images, nearest.indices, nearest.distances, strict=True):
        expected = np.sqrt([np.square(image.numpy() - other.numpy().astype(float)).sum() for other in learned]) / 255
        assert indices.tolist() == np.argsort(expected)[:2].tolist()
        assert found.tolist() == pytest.approx(np.sort(expected)[:2].tolist(), abs=0.02)
    assert nearest.ratio[3] < 0.01


def test_copies_of_training_images_that_occur_twice_count_as_memorised() -> None:
    learned = torch.randint(0, 256, (90, 1, 28, 28), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    nearest = nearest_learned(learned[:8], torch.cat([learned, learned]))
    assert memorised_share(nearest) == 1
    assert nearest.indices[:, 0].tolist() == list(range(8))


def test_mirrored_copies_count_as_memorised_only_if_the_training_mirrored_images() -> None:
    learned = torch.randint(0, 256, (90, 1, 28, 28), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    learned[3] = learned[3].maximum(learned[3].flip(-1))  # equals its mirror image
    mirrored = learned[:8].flip(-1)
    assert memorised_share(nearest_learned(mirrored, learned)) == 1 / 8
    assert memorised_share(nearest_learned(mirrored, learned, flip=True)) == 1


def test_copies_of_the_only_training_image_count_as_memorised() -> None:
    learned = torch.full((5, 1, 28, 28), 7, dtype=torch.uint8)
    assert memorised_share(nearest_learned(learned[:2], learned)) == 1


def test_copies_count_as_memorised() -> None:
    generator = torch.Generator().manual_seed(1)
    learned = torch.randint(0, 256, (90, 1, 28, 28), generator=generator, dtype=torch.uint8)
    images = torch.randint(0, 256, (8, 1, 28, 28), generator=generator, dtype=torch.uint8)
    images[[1, 5]] = learned[[4, 7]]
    assert memorised_share(nearest_learned(images, learned)) == 2 / 8
