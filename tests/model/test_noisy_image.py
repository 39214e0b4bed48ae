import math

import pytest
import torch

from model.noisy_image import (
    FULL_PAIRS,
    HIGHEST_COMPARED,
    NUM_CANDIDATES,
    NUM_PAIRS,
    ODDS_SCALE,
    PREDICTION_VARIANCE,
    NoisyComparison,
    can_compare,
    comparison_path,
    matching_timestep,
    noise_levels,
)
from model.schedule import Schedule, ScheduleConfig

SCHEDULE = Schedule(ScheduleConfig())


def test_matching_timestep_has_the_nearest_noise_level() -> None:
    for noise_std in (0.01, 0.6, 3.0, 17.0, 43.0, 80.0, 129.0, 210.0, 640.0, 1000.0):
        gaps = []
        for t in range(1, 101):
            alpha_bar = SCHEDULE.alpha_bar[t].item()
            gaps.append(abs(math.log(noise_std / (127.5 * math.sqrt((1 - alpha_bar) / alpha_bar)))))
        assert matching_timestep(SCHEDULE, noise_std) == 1 + gaps.index(min(gaps))
    assert [matching_timestep(SCHEDULE, noise_levels(SCHEDULE)[t].item()) for t in (1, 20, 65, 99)] == [1, 20, 65, 99]
    assert matching_timestep(SCHEDULE, 0) == 0


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
        assert comparison.label == (8 if step < 12 else 3)
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
        assert probabilities.index(max(probabilities)) == comparison.label
        candidates = [each for each in comparison.sums if math.isfinite(each)]
        dropped = [each for each, known in zip(sums, comparison.sums, strict=True) if math.isinf(known)]
        assert min(dropped) >= max(candidates)


def test_same_errors_are_weaker_evidence_in_stronger_noise() -> None:
    confidences = [max(finished([40.0, 45.0, 46.0], std).probabilities) for std in (0.6, 43.0, 210.0, 396.0)]
    assert confidences == sorted(confidences, reverse=True)
    assert confidences[0] > confidences[-1] + 0.1


def test_probabilities_of_very_different_errors_are_finite() -> None:
    assert finished([0.0, 1e6, 1e6], 0.6).probabilities == [1.0, 0.0, 0.0]
