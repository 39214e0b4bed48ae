import math
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from model.denoising import (
    FULL_PAIRS,
    HIGHEST_COMPARED,
    MAX_NOISE_STD,
    NOT_BACKGROUND,
    NUM_CANDIDATES,
    NUM_PAIRS,
    ODDS_SCALE,
    PREDICTION_VARIANCE,
    NoisyComparison,
    _log_likelihood_table,
    can_compare,
    comparison_path,
    estimate_noise_std,
    matching_timestep,
    noise_levels,
    restore_clipped,
    restored_image,
)
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


def test_matching_timestep_has_the_nearest_noise_level() -> None:
    for noise_std in (0.01, 0.6, 3.0, 17.0, 43.0, 80.0, 129.0, 210.0, 640.0, 1000.0):
        gaps = []
        for t in range(1, 101):
            alpha_bar = SCHEDULE.alpha_bar[t].item()
            gaps.append(abs(math.log(noise_std / (127.5 * math.sqrt((1 - alpha_bar) / alpha_bar)))))
        assert matching_timestep(SCHEDULE, noise_std) == 1 + gaps.index(min(gaps))
    assert [matching_timestep(SCHEDULE, noise_levels(SCHEDULE)[t].item()) for t in (1, 20, 65, 99)] == [1, 20, 65, 99]
    assert matching_timestep(SCHEDULE, 0) == 0


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


@pytest.mark.parametrize("t_image", [1, 20, 65, 83])
def test_comparison_uses_informative_timesteps_above_that_of_the_image(t_image: int) -> None:
    first, *timesteps = comparison_path(SCHEDULE, t_image)
    assert first == t_image
    assert len(set(timesteps)) == len(timesteps) == NUM_PAIRS
    assert max(t_image, 59) < min(timesteps)
    assert max(timesteps) == 92
    middle = sorted(timesteps)[NUM_PAIRS // 2]
    assert timesteps[0] == middle
    assert {timesteps[-1], timesteps[-2]} & {min(timesteps), max(timesteps)}


@pytest.mark.parametrize("num_steps", [2, 10, 1000])
def test_comparison_is_possible_for_schedules_of_any_length(num_steps: int) -> None:
    schedule = Schedule(ScheduleConfig(num_steps=num_steps))
    for t_image in range(1, math.ceil(0.84 * num_steps)):
        first, *timesteps = comparison_path(schedule, t_image)
        assert first == t_image
        assert len(timesteps) == NUM_PAIRS
        assert t_image < min(timesteps) <= max(timesteps) <= num_steps


@pytest.mark.parametrize("num_steps", [100, 1000])
def test_image_that_is_nearly_noise_is_not_compared(num_steps: int) -> None:
    schedule = Schedule(ScheduleConfig(num_steps=num_steps))
    possible = [can_compare(schedule, t) for t in range(1, num_steps + 1)]
    assert possible == sorted(possible, reverse=True)
    assert 0.8 < sum(possible) / num_steps < 0.92
    assert sum(possible) == math.ceil(HIGHEST_COMPARED * num_steps) - 1
    with pytest.raises(ValueError, match="too much noise"):
        comparison_path(schedule, sum(possible) + 1)


def test_comparison_of_a_noisy_image_keeps_the_best_classes_and_chooses_the_smallest_sum() -> None:
    comparison, step = NoisyComparison(10, 43.0), 0
    while comparison.remaining:
        # Class 8 is best in the first steps. Class 3 is best in the sum.
        errors = {y: 60.0 + y for y in range(10)} | {3: 56.0, 8: 40.0 + 3 * step}
        comparison.add([errors[y] for y in comparison.remaining])
        step += 1
        assert comparison.digit == (8 if step < 12 else 3)
        assert len(comparison.remaining) in (10, NUM_CANDIDATES, 0)
    assert step == 2 * NUM_PAIRS
    assert math.isinf(comparison.sums[9])
    assert sum(math.isfinite(each) for each in comparison.sums) == NUM_CANDIDATES


def finished(errors: list[float], noise_std: float) -> NoisyComparison:
    """Returns a comparison in which each class has the same error in every step."""
    comparison = NoisyComparison(len(errors), noise_std)
    while comparison.remaining:
        comparison.add([errors[y] for y in comparison.remaining])
    return comparison


@pytest.mark.parametrize("noise_std", [1.0, 43.0, 396.0])
def test_log_odds_of_two_candidates_are_the_difference_of_their_errors_by_the_variance(noise_std: float) -> None:
    probabilities = finished([44.0, 45.0, 41.0, 43.0], noise_std).probabilities
    assert sum(probabilities) == pytest.approx(1)
    k = ODDS_SCALE / ((noise_std / 127.5) ** 2 + PREDICTION_VARIANCE)
    for y, gap in ((0, 3.0), (1, 4.0), (3, 2.0)):
        log_odds = math.log(probabilities[2] / probabilities[y])
        assert log_odds == pytest.approx(k * gap * 2 * NUM_PAIRS)


def test_dropped_class_gets_the_errors_of_the_worst_candidate_in_the_steps_that_it_missed() -> None:
    full, rest = 2 * FULL_PAIRS, 2 * (NUM_PAIRS - FULL_PAIRS)
    comparison = finished([40.0, 41.0, 42.0, 44.0, 50.0, 60.0], 43.0)
    assert comparison.sums[4:] == [math.inf, math.inf]
    expected = [(full + rest) * each for each in (40.0, 41.0, 42.0, 44.0)]
    assert comparison.estimated_sums == [*expected, full * 50.0 + rest * 44.0, full * 60.0 + rest * 44.0]
    assert comparison.probabilities == sorted(comparison.probabilities, reverse=True)
    assert comparison.probabilities[-1] > 0


def test_recognised_digit_has_the_largest_probability_for_any_errors() -> None:
    random = torch.Generator().manual_seed(0)
    for _ in range(200):
        comparison = NoisyComparison(10, 210.0)
        while comparison.remaining:
            comparison.add((200 * torch.rand(len(comparison.remaining), generator=random)).tolist())
        probabilities, sums = comparison.probabilities, comparison.estimated_sums
        assert sum(probabilities) == pytest.approx(1)
        assert probabilities.index(max(probabilities)) == comparison.digit
        candidates = [each for each in comparison.sums if math.isfinite(each)]
        dropped = [each for each, known in zip(sums, comparison.sums, strict=True) if math.isinf(known)]
        assert min(dropped) >= max(candidates)


def test_same_errors_are_weaker_evidence_in_stronger_noise() -> None:
    confidences = [max(finished([40.0, 45.0, 46.0], std).probabilities) for std in (0.6, 43.0, 210.0, 396.0)]
    assert confidences == sorted(confidences, reverse=True)
    assert confidences[0] > confidences[-1] + 0.1


def test_probabilities_of_very_different_errors_are_finite() -> None:
    assert finished([0.0, 1e6, 1e6], 0.6).probabilities == [1.0, 0.0, 0.0]
