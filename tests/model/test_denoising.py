import math
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from model.denoising import (
    MAX_NOISE_STD,
    NOT_BACKGROUND,
    _log_likelihood_table,
    estimate_noise_std,
    restore_clipped,
    restored_image,
)
from model.noisy_image import matching_timestep, noise_levels
from model.pixels import from_pixels
from model.prediction import Prediction, PredictionConfig, predict_x_0
from model.schedule import Schedule, ScheduleConfig

SCHEDULE = Schedule(ScheduleConfig())
NORMAL = NormalDist()


def drawing(size: int = 28) -> Tensor:
    """Returns a ring with grey edges on black, (1, 1, size, size), in grey levels."""
    axis = torch.linspace(-1, 1, size)
    radius = (axis[:, None].square() + axis.square()).sqrt()
    return (255 * (1 - (radius - 0.5).abs() * 6).clamp(0, 1)).round()[None, None]


def noisy(clean: Tensor, noise_std: float, seed: int = 0) -> Tensor:
    z = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    return (clean + noise_std * z).clamp(0, 255).round().to(torch.uint8)


@pytest.mark.parametrize("noise_std", [3.0, 20.0, 43.0, 129.0, 210.0, 500.0])
def test_estimate_is_near_the_noise_of_a_drawing(noise_std: float) -> None:
    estimates = estimate_noise_std(noisy(drawing().expand(200, 1, 28, 28), noise_std))
    assert (estimates / noise_std - 1).abs().median() < 0.1
    assert estimates.median().item() == pytest.approx(noise_std, rel=0.06)


def test_error_of_the_estimate_falls_with_the_number_of_background_pixels() -> None:
    # The Fisher information of a censored normal scale is about 1 / s^2 for each pixel, half of which are clipped.
    errors = {}
    for size in (28, 56):
        estimates = estimate_noise_std(noisy(torch.zeros(400, 1, size, size), 40.0))
        errors[size] = (estimates / 40 - 1).std().item()
        assert errors[size] < 1.4 / math.sqrt(size * size / 2)
    assert errors[56] < 0.65 * errors[28]


def test_estimate_for_an_image_without_noise_is_0() -> None:
    assert estimate_noise_std(drawing().to(torch.uint8)).tolist() == [0]
    assert estimate_noise_std(torch.zeros(1, 1, 28, 28, dtype=torch.uint8)).tolist() == [0]


def test_estimate_is_at_most_the_largest_noise() -> None:
    estimates = estimate_noise_std(noisy(drawing().expand(50, 1, 28, 28), 5_000.0))
    assert estimates.max() <= MAX_NOISE_STD
    assert estimates.min() > 600


def test_estimate_of_an_image_does_not_depend_on_the_batch() -> None:
    pictures = torch.cat([noisy(drawing(), std, seed=int(std)) for std in (0.0, 10.0, 300.0)])
    alone = torch.cat([estimate_noise_std(picture[None]) for picture in pictures])
    torch.testing.assert_close(estimate_noise_std(pictures), alone, rtol=1e-9, atol=0)


@pytest.mark.parametrize("noise_std", [1.0, 43.0, 700.0])
def test_restored_pixels_have_the_mean_of_the_values_that_were_clipped(noise_std: float) -> None:
    z = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for limit, values in ((0, noise_std * z), (255, 255 + noise_std * z)):
        pixels = values.clamp(0, 255).round()
        clipped = pixels == limit
        restored = restore_clipped(torch.full((1, 1, 1, 1), limit), torch.tensor([noise_std])).item()
        expected = values[clipped].mean().item()
        assert restored == pytest.approx(expected, abs=0.01 * noise_std)


def test_restoration_changes_only_clipped_pixels_and_nothing_without_noise() -> None:
    pixels = torch.tensor([0, 1, 127, 254, 255], dtype=torch.uint8).expand(2, 1, 1, 5)
    restored = restore_clipped(pixels, torch.tensor([100.0, 0.0]))
    assert restored[0, 0, 0, 1:4].tolist() == [1, 127, 254]
    assert restored[0, 0, 0, 0].item() == pytest.approx(-math.sqrt(2 / math.pi) * 100, rel=0.01)
    assert restored[0, 0, 0, 4].item() == pytest.approx(255 + math.sqrt(2 / math.pi) * 100, rel=0.01)
    assert restored[1, 0, 0].tolist() == [0, 1, 127, 254, 255]


def test_restored_image_without_noise_is_the_image() -> None:
    pixels = drawing().to(torch.uint8)
    torch.testing.assert_close(restored_image(pixels, [0.0]), from_pixels(pixels))


def test_start_and_ideal_prediction_give_the_posterior_mean_of_gaussian_images() -> None:
    """For x ~ N(m, v) the posterior mean of x given y = x + s z is (s^2 m + v y) / (s^2 + v).

    The network is replaced by the v prediction that is exact for this prior. The result must be this mean.
    """
    m, v, noise_std = 100.0, 20.0**2, 30.0  # in grey levels; no pixel is clipped
    z = torch.randn(2, 1, 1, 500, generator=torch.Generator().manual_seed(0))
    y = (m + math.sqrt(v) * z[0] + noise_std * z[1]).clamp(1, 254).round()[None]  # (1, 1, 1, 500)
    t = matching_timestep(SCHEDULE, noise_std)
    x_t = SCHEDULE.alpha_bar[t].sqrt() * restored_image(y, [noise_std])
    a, s = SCHEDULE.alpha_bar[t].sqrt(), (1 - SCHEDULE.alpha_bar[t]).sqrt()
    mean, var = m / 127.5 - 1, v / 127.5**2
    # Bishop 2006, eq. 2.81 and 2.96: the conditional mean of jointly normal v = a eps - s x_0 and x_t = a x_0 + s eps
    gain = (a * s - s * a * var) / (a * a * var + s * s)
    output = -s * mean + gain * (x_t - a * mean)
    mix = Prediction(PredictionConfig("v"), SCHEDULE).table(x_t.device)[[t]]
    predicted = (predict_x_0(x_t.float(), output.float(), mix) + 1) * 127.5
    level = noise_levels(SCHEDULE)[t].item()
    expected = (level**2 * m + v * y) / (level**2 + v)
    torch.testing.assert_close(predicted, expected.float(), rtol=0, atol=0.05)


def test_normal_integral_in_the_table_matches_sums_over_clean_grey_levels() -> None:
    levels, table = _log_likelihood_table()
    torch.testing.assert_close(table.exp().sum(dim=1), torch.ones(len(levels), dtype=torch.float64))
    row = int((levels - 60).abs().argmin())
    std, clean = levels[row].item(), [(i + 0.5) / 20 for i in range(255 * 20)]
    for pixel in (0, 1, 100, 255):
        low = -math.inf if pixel == 0 else pixel - 0.5
        high = math.inf if pixel == 255 else pixel + 0.5
        share = [NORMAL.cdf((high - x) / std) - NORMAL.cdf((low - x) / std) for x in (0, *clean)]
        expected = (1 - NOT_BACKGROUND) * share[0] + NOT_BACKGROUND * sum(share[1:]) / len(clean)
        assert table[row, pixel].exp().item() == pytest.approx(expected, rel=1e-4)
