import math

import pytest
import torch

from model.noisy_image import NUM_PAIRS, NoisyComparison
from scripts.evaluation.noise_search import as_search_row, fit_probabilities, search_figures


def finished(sums: list[float], noise_std: float) -> NoisyComparison:
    """Returns a comparison with these sums, of four classes, none of which is dropped."""
    comparison = NoisyComparison(len(sums), noise_std)
    while comparison.remaining:
        comparison.add([sums[y] / (2 * NUM_PAIRS) for y in comparison.remaining])
    return comparison


def test_fit_finds_the_constants_that_the_labels_were_drawn_with() -> None:
    scale, variance = 0.06, 1.5
    random = torch.Generator().manual_seed(0)
    sums = 200 * torch.rand(3_000, 4, generator=random, dtype=torch.float64)  # (N, C)
    labels = torch.zeros(3_000, dtype=torch.int64)
    found = []
    for noise_std in (30.0, 150.0, 400.0):
        k = scale / ((noise_std / 127.5) ** 2 + variance)
        drawn = (-k * sums).softmax(dim=1).multinomial(1, generator=random)[:, 0]  # (N,) the class of each image
        # The classes are exchanged so that the drawn one is class 0. All levels then have the same labels.
        order = (torch.arange(4) + drawn[:, None]) % 4  # (N, C)
        found.append([finished(each, noise_std) for each in sums.gather(1, order).tolist()])
    fitted_scale, fitted_variance = fit_probabilities(found, labels)
    for noise_std in (30.0, 150.0, 400.0):
        sigma = noise_std / 127.5
        expected = scale / (sigma**2 + variance)
        assert fitted_scale / (sigma**2 + fitted_variance) == pytest.approx(expected, rel=0.15)


def test_figures_are_those_of_the_probabilities() -> None:
    found = [finished([0.0, 1e5, 1e5, 1e5], 43.0), finished([1.0, 1.0, 1.0, 1.0], 43.0)]
    figures = search_figures(found, torch.tensor([0, 3]))  # the second result is class 0 with probability 1/4
    assert figures["accuracy"] == 0.5
    assert figures["log_loss"] == pytest.approx(math.log(4) / 2)
    assert figures["calibration_error"] == pytest.approx(0.25 / 2)
    assert figures["of_true_digit"] == pytest.approx((1 + 0.25) / 2)


def test_row_has_percentages() -> None:
    figures = {"accuracy": 0.976, "log_loss": 0.0884, "calibration_error": 0.0171, "of_true_digit": 0.9574}
    assert as_search_row({"t": 50, "noise_std": 129.1, **figures}) == ["129", "50", "97.6%", "0.088", "1.7%", "95.7%"]
