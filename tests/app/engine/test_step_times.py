import pytest

from app.engine.step_times import StepTimes

CURVE = {1: 1.0, 4: 2.5, 8: 3.0}


@pytest.mark.parametrize(("rows", "seconds"), [(1, 1.0), (2, 1.5), (3, 2.0), (4, 2.5), (6, 2.75), (8, 3.0), (0, 1.0)])
def test_step_time_is_interpolated_between_measured_batches(rows: int, seconds: float) -> None:
    assert StepTimes(CURVE).step_seconds(rows) == pytest.approx(seconds)


def test_step_time_above_the_largest_batch_is_proportional() -> None:
    assert StepTimes(CURVE).step_seconds(24) == pytest.approx(3 * StepTimes(CURVE).step_seconds(8))


def test_curve_may_have_any_order() -> None:
    assert StepTimes(dict(reversed(CURVE.items()))).step_seconds(2) == pytest.approx(1.5)


def test_slowdown_applies_to_all_batch_sizes() -> None:
    step_times = StepTimes(CURVE)
    for _ in range(200):
        step_times.observe([4], 5.0)  # Steps take twice as long as at warm-up.
    assert step_times.step_seconds(1) == pytest.approx(2.0, rel=0.01)
    assert step_times.step_seconds(8) == pytest.approx(6.0, rel=0.01)


def test_one_slow_step_changes_the_slowdown_little() -> None:
    step_times = StepTimes(CURVE)
    step_times.observe([1], 3.0)
    assert 1.0 < step_times.step_seconds(1) < 1.2


def test_interrupted_step_changes_the_slowdown_little() -> None:
    step_times = StepTimes(CURVE)
    step_times.observe([1], 3600.0)
    assert 1.0 < step_times.step_seconds(1) < 1.2


def test_slowdown_reaches_a_large_factor_after_many_slow_steps() -> None:
    step_times = StepTimes(CURVE)
    for _ in range(200):
        step_times.observe([1], 50.0)
    assert step_times.step_seconds(1) == pytest.approx(50.0, rel=0.01)


def test_steps_with_the_predicted_time_do_not_change_the_slowdown() -> None:
    step_times = StepTimes(CURVE)
    for rows in (1, 2, 8, 64):
        step_times.observe([rows], step_times.step_seconds(rows))
    assert step_times.slowdown == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("curve", "tolerance", "seconds", "best"),
    [
        ({1: 1.0, 2: 2.0, 4: 4.0}, 0.2, 9.0, 4),  # All rates are equal, so the largest batch is the result.
        ({1: 1.0, 2: 2.0, 4: 4.0}, 0.2, 2.0, 2),  # The largest batch within the time limit is the result.
        ({1: 1.0, 2: 1.0, 4: 1.0}, 0.2, 0.5, 4),  # Only one batch is near the best rate, and it takes longer.
        ({8: 1.0, 16: 1.6, 32: 2.9}, 0.2, 9.0, 32),  # The rates are 8, 10 and 11 per second.
        ({8: 1.0, 16: 1.6, 32: 2.9}, 0.2, 2.0, 16),
        ({8: 1.0, 16: 1.6, 32: 2.9}, 0.0, 2.0, 32),
        ({8: 1.0, 16: 1.6, 32: 2.9}, 0.2, 1.0, 16),  # All batches near the best rate take longer than the limit.
        ({1: 1.0, 8: 1.0, 64: 100.0}, 0.2, 200.0, 8),  # The largest batch has a low rate.
    ],
)
def test_best_batch_is_the_largest_batch_with_almost_the_best_rate(
    curve: dict[int, float], tolerance: float, seconds: float, best: int
) -> None:
    assert StepTimes(curve).best_batch(tolerance, seconds) == best


def test_predicted_time_of_two_models_is_the_sum_of_their_calls() -> None:
    step_times = StepTimes(CURVE)
    step_times.observe([4, 1], 3.5)
    assert step_times.slowdown == pytest.approx(1.0)
    step_times.observe([4, 1], 7.0)
    assert step_times.slowdown > 1.0


@pytest.mark.parametrize(
    ("curve", "seconds", "largest"),
    [
        ({1: 1.0, 2: 2.0, 4: 4.0}, 3.0, 3),  # The result is between two measured batches.
        ({1: 1.0, 8: 1.0, 64: 2.0}, 3.0, 64),  # The result does not exceed the largest measured batch.
        ({1: 1.0, 8: 8.0}, 1.0, 1),
        ({1: 1.0, 8: 8.0}, 0.5, 0),
        ({16: 1.0, 32: 2.0}, 1.5, 24),  # Below 16 rows the time is constant.
    ],
)
def test_largest_batch_within_a_time_limit_is_found(curve: dict[int, float], seconds: float, largest: int) -> None:
    step_times = StepTimes(curve)
    step_times.slowdown = 7.0
    assert step_times.largest_batch(seconds) == largest


def test_one_row_of_a_clip_call_counts_as_evaluations_of_the_same_duration() -> None:
    """At the best rate, an evaluation takes 0.5 s. A call of 8 rows that takes 9 s takes 1.125 s a row."""
    assert StepTimes({1: 1.0, 8: 4.0}, clip_seconds=9.0).clip_evaluations == 3
    assert StepTimes({1: 1.0, 8: 4.0}).clip_evaluations == 0


def test_step_with_clip_calls_at_the_predicted_time_keeps_the_slowdown() -> None:
    step_times = StepTimes({1: 1.0, 8: 4.0}, clip_seconds=9.0)
    step_times.slowdown = 2.0
    step_times.observe([8, 1], 2 * (4.0 + 1.0 + 3 * 9.0), clip_calls=3)
    assert step_times.slowdown == pytest.approx(2.0)
