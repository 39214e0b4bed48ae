import math

import pytest
import torch

from scripts.evaluation.denoising import add_noise, as_row, psnr


def test_psnr_is_the_mean_of_the_values_of_the_images() -> None:
    truth = torch.full((2, 1, 4, 4), 100, dtype=torch.uint8)
    images = truth.clone()
    images[0] += 10  # mean squared error 100
    images[1, :, 0] += 20  # mean squared error 100
    images[1, :, 1] -= 60  # and 900 more
    expected = (20 * math.log10(255 / 10) + 10 * math.log10(255**2 / 1000)) / 2
    assert psnr(images, truth) == pytest.approx(expected)


def test_noise_has_the_requested_standard_deviation_and_the_same_values_for_the_same_seed() -> None:
    images = torch.full((50, 1, 28, 28), 128, dtype=torch.uint8)
    noisy = add_noise(images, 20.0, seed=3)
    assert (noisy.double() - 128).std().item() == pytest.approx(20, rel=0.02)
    assert torch.equal(noisy, add_noise(images, 20.0, seed=3))
    assert not torch.equal(noisy, add_noise(images, 20.0, seed=4))


def test_row_has_decibels_and_percentages() -> None:
    names = ("psnr_noisy", "psnr_mean", "psnr_sample", "recognised", "judge_mean", "judge_sample")
    row = dict(zip(names, (13.01, 24.55, 22.0, 0.97, 0.99, 0.985), strict=True))
    cells = as_row({"t": 35, "noise_std": 79.5, "noise_std_median_relative_error": 0.038, **row})
    assert cells == ["35", "80", "3.8%", "13.0", "24.6", "22.0", "97.0%", "99.0%", "98.5%"]
