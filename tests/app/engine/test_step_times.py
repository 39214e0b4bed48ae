import math
import random
import statistics

import pytest

from app.engine.step_times import Curve, StepTimes

CURVE = {1: 1.0, 4: 2.5, 8: 3.0}
MILLISECONDS = {rows: seconds / 1000 for rows, seconds in CURVE.items()}
FAST = {1: 4.0, 8: 4.0}  # the curve of another model


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
        step_times.observe({"default": 4}, {}, 5.0)  # Steps take twice as long as at warm-up.
    assert step_times.step_seconds(1) == pytest.approx(2.0, rel=0.01)
    assert step_times.step_seconds(8) == pytest.approx(6.0, rel=0.01)


def test_one_slow_step_changes_the_slowdown_little() -> None:
    step_times = StepTimes(MILLISECONDS)
    step_times.observe({"default": 1}, {}, 3e-3)
    assert 1.0 < step_times.slowdown < 1.02


def test_interrupted_step_changes_the_slowdown_little() -> None:
    step_times = StepTimes(MILLISECONDS)
    step_times.observe({"default": 1}, {}, 3600.0)
    assert 1.0 < step_times.slowdown < 1.1


@pytest.mark.parametrize("evaluations", [1, 64])  # steps of 1 ms and of 24 ms
@pytest.mark.parametrize(("before", "after"), [(1, 2), (1, 4), (1, 10), (10, 1), (4, 1)])
def test_slowdown_follows_a_change_of_speed_within_a_second(before: float, after: float, evaluations: int) -> None:
    step_times = StepTimes(MILLISECONDS)
    step_times.slowdown = before
    step_seconds = after * step_times.of("default").seconds(evaluations)
    for _ in range(math.ceil(1.0 / step_seconds)):
        step_times.observe({"default": evaluations}, {}, step_seconds)
    assert step_times.slowdown == pytest.approx(after, rel=0.1)


def test_slowdown_reaches_a_large_factor_after_many_slow_steps() -> None:
    step_times = StepTimes(CURVE)
    for _ in range(20):
        step_times.observe({"default": 1}, {}, 5000.0)
    assert step_times.step_seconds(1) == pytest.approx(5000.0, rel=0.01)


def test_slowdown_of_varying_steps_is_their_total_time_divided_by_the_predicted_one() -> None:
    choose, step_times, slowdowns = random.Random(1), StepTimes(MILLISECONDS), list[float]()
    actual = predicted = 0.0
    for _ in range(20_000):
        evaluations = choose.choice([1, 4, 8])
        seconds = step_times.of("default").seconds(evaluations)
        taken = choose.choice([1, 1, 5]) * seconds
        actual, predicted = actual + taken, predicted + seconds
        step_times.observe({"default": evaluations}, {}, taken)
        slowdowns.append(step_times.slowdown)
    assert statistics.mean(slowdowns) == pytest.approx(actual / predicted, rel=0.05)


def test_steps_with_the_predicted_time_do_not_change_the_slowdown() -> None:
    step_times = StepTimes(CURVE)
    for rows in (1, 2, 8, 64):
        step_times.observe({"default": rows}, {}, step_times.step_seconds(rows))
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
    assert Curve(curve).best_batch(tolerance, seconds) == best


def test_predicted_time_of_two_models_is_the_sum_of_their_calls() -> None:
    step_times = StepTimes(CURVE, of_models={"fast": FAST})
    step_times.observe({"default": 4, "fast": 1}, {}, 2.5 + 4.0)
    assert step_times.slowdown == pytest.approx(1.0)
    step_times.observe({"default": 4, "fast": 1}, {}, 2 * (2.5 + 4.0))
    assert step_times.slowdown == pytest.approx(2.0, rel=0.01)


def test_slowest_curve_has_the_longest_time_of_the_models_for_each_size() -> None:
    step_times = StepTimes(CURVE, of_models={"fast": {1: 0.5, 2: 3.0, 16: 6.0}})
    assert [step_times.slowest(["fast"]).seconds(rows) for rows in (1, 2, 16)] == [0.5, 3.0, 6.0]
    both = step_times.slowest(["default", "fast"])
    for rows in (1, 2, 4, 8, 16, 32):
        longest = max(step_times.of(model).seconds(rows) for model in ("default", "fast"))
        assert both.seconds(rows) == pytest.approx(longest)


def test_further_calls_take_the_time_of_a_call_with_one_evaluation_each() -> None:
    step_times = StepTimes(CURVE, of_models={"fast": FAST})
    assert step_times.further_calls_seconds(["default"], rows=16) == 0.0
    assert step_times.further_calls_seconds(["default", "other"], rows=16) == 1.0
    assert step_times.further_calls_seconds(["default", "fast", "other"], rows=16) == 1.0 + 4.0


@pytest.mark.parametrize(("rows", "seconds"), [(1, 0.0), (2, 4.0), (3, 4.0 + 1.0), (4, 4.0 + 1.0)])
def test_step_has_no_more_calls_than_rows(rows: int, seconds: float) -> None:
    step_times = StepTimes(CURVE, of_models={"fast": FAST})
    assert step_times.further_calls_seconds(["default", "fast", "other"], rows) == seconds


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
    assert Curve(curve).largest_batch(seconds) == largest


def test_one_row_of_a_clip_call_counts_as_evaluations_of_the_same_duration() -> None:
    """At the best rate, an evaluation takes 0.5 s. A call of 8 rows that takes 9 s takes 1.125 s a row."""
    assert StepTimes({1: 1.0, 8: 4.0}, clip_seconds=9.0).clip_evaluations == 3
    assert StepTimes({1: 1.0, 8: 4.0}).clip_evaluations == 0


def test_step_with_clip_calls_at_the_predicted_time_keeps_the_slowdown() -> None:
    step_times = StepTimes({1: 1.0, 8: 4.0}, clip_seconds=9.0)
    step_times.slowdown = 2.0
    step_times.observe({"default": 8, "fast": 1}, {"default": 9, "fast": 1}, 2 * (4.0 + 1.0 + 3 * 9.0))
    assert step_times.slowdown == pytest.approx(2.0)
