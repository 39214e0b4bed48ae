import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from model.schedule import Schedule, ScheduleConfig

LINEAR = ScheduleConfig(kind="linear")
COSINE = ScheduleConfig(kind="cosine")
BOTH = pytest.mark.parametrize("config", [LINEAR, COSINE], ids=["linear", "cosine"])
EVERY_NUM_STEPS = range(1, 101)


@BOTH
def test_alpha_bar_is_1_at_step_0_and_decreases(config: ScheduleConfig) -> None:
    alpha_bar = Schedule(config).alpha_bar
    assert alpha_bar.shape == (101,)
    assert alpha_bar[0] == 1
    assert (alpha_bar.diff() < 0).all()
    assert (alpha_bar > 0).all()


@BOTH
def test_alpha_bar_is_near_0_at_the_last_step(config: ScheduleConfig) -> None:
    assert Schedule(config).alpha_bar[100] < 1e-3


def test_betas_for_1000_steps_leave_alpha_bar_at_0_36_after_100_steps() -> None:
    naive = Schedule(ScheduleConfig(kind="linear", beta_start=1e-4, beta_end=0.02))
    assert naive.alpha_bar[100].item() == pytest.approx(0.364, abs=5e-4)


def test_linear_schedule_is_the_product_of_1_minus_beta() -> None:
    product = 1.0
    for t in range(1, 101):
        product *= 1 - (1e-3 + (0.2 - 1e-3) * (t - 1) / 99)
        assert Schedule(LINEAR).alpha_bar[t].item() == pytest.approx(product, rel=1e-12)


def test_cosine_schedule_equals_the_paper_and_clips_the_last_beta() -> None:
    def f(t: int) -> float:
        return math.cos((t / 100 + 0.008) / 1.008 * math.pi / 2) ** 2

    alpha_bar = Schedule(COSINE).alpha_bar
    for t in range(1, 100):
        assert alpha_bar[t].item() == pytest.approx(f(t) / f(0), rel=1e-9)
    assert (1 - alpha_bar[100] / alpha_bar[99]).item() == pytest.approx(0.999)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (ScheduleConfig("linear", 100, 0.999999, 0.999999), "too much noise: alpha_bar must be at least 1e-70"),
        (ScheduleConfig("linear", 10_000), "too much noise: .*, but ends at "),
        (ScheduleConfig("linear", 100, 0.9, 0.9), "too much noise: .*, but ends at 1e-100"),
        (ScheduleConfig("linear", 100, 1e-320, 1e-320), "too little noise"),
        (ScheduleConfig("linear", 100, 1e-17, 0.2), "too little noise"),
    ],
    ids=str,
)
def test_schedule_that_no_sampler_could_use_is_refused(config: ScheduleConfig, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Schedule(config)


@BOTH
def test_squares_of_signal_and_noise_are_alpha_bar_and_its_complement(config: ScheduleConfig) -> None:
    schedule = Schedule(config)
    for t, alpha_bar in enumerate(schedule.alpha_bar.tolist()):
        signal, noise = schedule.signal_and_noise(t)
        assert (signal**2, noise**2) == pytest.approx((alpha_bar, 1 - alpha_bar), rel=1e-15)


@BOTH
def test_half_log_snr_inverts_to_alpha_bar(config: ScheduleConfig) -> None:
    schedule = Schedule(config)
    assert schedule.half_log_snr[0] == torch.inf
    torch.testing.assert_close(torch.sigmoid(2 * schedule.half_log_snr), schedule.alpha_bar)


@BOTH
@pytest.mark.parametrize("spacing", ["even_timesteps", "log_snr_timesteps"])
def test_timesteps_are_distinct_and_decreasing_for_every_num_steps(config: ScheduleConfig, spacing: str) -> None:
    schedule = Schedule(config)
    for num_steps in EVERY_NUM_STEPS:
        timesteps = getattr(schedule, spacing)(num_steps)
        assert len(timesteps) == num_steps + 1
        assert all(t > t_prev for t, t_prev in pairwise(timesteps))
        assert timesteps[0] <= 100
        assert timesteps[-1] == 0


@BOTH
def test_even_timesteps_start_at_T_and_are_rounded_from_an_even_grid(config: ScheduleConfig) -> None:
    for num_steps in EVERY_NUM_STEPS:
        timesteps = Schedule(config).even_timesteps(num_steps)
        assert timesteps[0] == 100
        for i, t in enumerate(timesteps):
            assert abs(t - 100 * (num_steps - i) / num_steps) <= 0.5


@BOTH
def test_log_snr_timesteps_are_nearest_to_an_even_grid_after_a_longer_first_step(config: ScheduleConfig) -> None:
    half_log_snr = Schedule(config).half_log_snr.tolist()
    for num_steps in (2, 3, 5, 9, 18):
        *timesteps, _ = Schedule(config).log_snr_timesteps(num_steps)
        first_of_grid = half_log_snr[100]
        # The grid begins at -3.5 if the first step is then longer than the others.
        if num_steps > 2 and -3.5 - first_of_grid > (half_log_snr[1] + 3.5) / (num_steps - 2):
            assert timesteps.pop(0) == 100
            first_of_grid = -3.5
        for i, t in enumerate(timesteps):
            share = i / (len(timesteps) - 1) if i else 0
            target = first_of_grid + (half_log_snr[1] - first_of_grid) * share
            nearest = min(range(1, 101), key=lambda s: abs(half_log_snr[s] - target))
            # Near t = 0 several grid points have the same nearest timestep. Such timesteps are moved to be distinct.
            lowest = len(timesteps) - i
            assert t == max(nearest, lowest) or (nearest >= timesteps[i - 1] and t == timesteps[i - 1] - 1)


@pytest.mark.parametrize(
    ("num_steps", "start", "expected"),
    [
        (10, 100, [100, 98, 95, 88, 73, 47, 22, 9, 3, 1, 0]),
        (3, 100, [100, 91, 1, 0]),
        (10, 99, [99, 98, 94, 87, 70, 43, 20, 8, 3, 1, 0]),
    ],
)
def test_no_step_of_a_cosine_path_follows_a_much_shorter_one(num_steps: int, start: int, expected: list[int]) -> None:
    """A step of second order uses the step before it, so it is inaccurate if that one is much shorter."""
    schedule = Schedule(COSINE)
    path = schedule.log_snr_timesteps(num_steps, start)
    assert path == expected
    half_log_snr = schedule.half_log_snr.tolist()
    lengths = [half_log_snr[t_prev] - half_log_snr[t] for t, t_prev in pairwise(path[:-1])]
    assert max(after / before for before, after in pairwise(lengths)) < 2


@BOTH
@pytest.mark.parametrize("start", [100, 99, 60, 5])
def test_log_snr_timesteps_begin_at_the_start(config: ScheduleConfig, start: int) -> None:
    for num_steps in (1, 2, 5):
        assert Schedule(config).log_snr_timesteps(num_steps, start)[0] == start


def test_all_timesteps_are_visited_with_T_steps() -> None:
    assert Schedule(COSINE).even_timesteps(100) == list(range(100, -1, -1))
    assert Schedule(COSINE).log_snr_timesteps(100) == list(range(100, -1, -1))


@pytest.mark.parametrize("num_steps", [0, -1, 101])
@pytest.mark.parametrize("spacing", ["even_timesteps", "log_snr_timesteps"])
def test_num_steps_out_of_range_is_rejected(num_steps: int, spacing: str) -> None:
    with pytest.raises(ValueError, match="num_steps must be 1 to 100"):
        getattr(Schedule(COSINE), spacing)(num_steps)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"kind": "sigmoid"}, "unknown schedule kind 'sigmoid': must be linear or cosine"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"beta_start": 0.3, "beta_end": 0.2}, "betas must satisfy .*, got 0.3 and 0.2"),
        ({"beta_end": 1.0}, "betas must satisfy .*, got 0.001 and 1.0"),
        ({"beta_start": float("nan")}, "betas must satisfy .*, got nan and 0.2"),
    ],
)
def test_invalid_schedule_config_is_rejected(field: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**field)


@pytest.mark.parametrize("start", [1, 2, 7, 20, 65, 99])
@pytest.mark.parametrize("num_steps", [1, 3, 10, 100])
def test_even_timesteps_from_a_start_are_distinct_and_decrease_to_0(start: int, num_steps: int) -> None:
    count = min(num_steps, start)
    timesteps = Schedule(ScheduleConfig()).even_timesteps(count, start)
    assert (timesteps[0], timesteps[-1], len(timesteps)) == (start, 0, count + 1)
    assert sorted(set(timesteps), reverse=True) == timesteps


def test_even_timesteps_from_a_start_have_equal_distances() -> None:
    assert Schedule(ScheduleConfig()).even_timesteps(5, 65) == [65, 52, 39, 26, 13, 0]
