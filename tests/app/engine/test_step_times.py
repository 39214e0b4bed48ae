import pytest

from app.engine.step_times import StepTimes

CURVE = {1: 1.0, 4: 2.5, 8: 3.0}


@pytest.mark.parametrize(("rows", "seconds"), [(1, 1.0), (2, 1.5), (3, 2.0), (4, 2.5), (6, 2.75), (8, 3.0), (0, 1.0)])
def test_a_step_takes_what_the_curve_says(rows: int, seconds: float) -> None:
    assert StepTimes(CURVE).step_seconds(rows) == pytest.approx(seconds)


def test_past_the_curve_each_evaluation_costs_what_it_does_at_its_end() -> None:
    assert StepTimes(CURVE).step_seconds(24) == pytest.approx(3 * StepTimes(CURVE).step_seconds(8))


def test_the_curve_may_come_in_any_order() -> None:
    assert StepTimes(dict(reversed(CURVE.items()))).step_seconds(2) == pytest.approx(1.5)


def test_a_slower_machine_is_learned_for_all_batches() -> None:
    step_times = StepTimes(CURVE)
    for _ in range(200):
        step_times.observe([4], 5.0)  # twice as long as at warm-up
    assert step_times.step_seconds(1) == pytest.approx(2.0, rel=0.01)
    assert step_times.step_seconds(8) == pytest.approx(6.0, rel=0.01)


def test_one_slow_step_changes_little() -> None:
    step_times = StepTimes(CURVE)
    step_times.observe([1], 3.0)
    assert 1.0 < step_times.step_seconds(1) < 1.2


def test_a_machine_that_stood_still_for_an_hour_is_not_taken_for_a_slow_one() -> None:
    step_times = StepTimes(CURVE)
    step_times.observe([1], 3600.0)
    assert 1.0 < step_times.step_seconds(1) < 1.2


def test_a_machine_that_is_much_slower_is_learned_all_the_same() -> None:
    step_times = StepTimes(CURVE)
    for _ in range(200):
        step_times.observe([1], 50.0)
    assert step_times.step_seconds(1) == pytest.approx(50.0, rel=0.01)


def test_steps_as_expected_change_nothing() -> None:
    step_times = StepTimes(CURVE)
    for rows in (1, 2, 8, 64):
        step_times.observe([rows], step_times.step_seconds(rows))
    assert step_times.slowdown == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("curve", "tolerance", "seconds", "best"),
    [
        ({1: 1.0, 2: 2.0, 4: 4.0}, 0.2, 9.0, 4),  # all rates are equal: the largest
        ({1: 1.0, 2: 2.0, 4: 4.0}, 0.2, 2.0, 2),  # the largest within the time
        ({1: 1.0, 2: 1.0, 4: 1.0}, 0.2, 0.5, 4),  # one batch has the best rate, even if it takes longer
        ({8: 1.0, 16: 1.6, 32: 2.9}, 0.2, 9.0, 32),  # 8, 10, 11 rows a second
        ({8: 1.0, 16: 1.6, 32: 2.9}, 0.2, 2.0, 16),
        ({8: 1.0, 16: 1.6, 32: 2.9}, 0.0, 2.0, 32),
        ({8: 1.0, 16: 1.6, 32: 2.9}, 0.2, 1.0, 16),  # all batches near the best rate take longer: the smallest of them
        ({1: 1.0, 8: 1.0, 64: 100.0}, 0.2, 200.0, 8),  # the largest has a low rate
    ],
)
def test_the_best_batch_is_the_largest_near_the_best_rate_within_the_time(
    curve: dict[int, float], tolerance: float, seconds: float, best: int
) -> None:
    assert StepTimes(curve).best_batch(tolerance, seconds) == best


def test_a_step_of_two_models_takes_the_time_of_both_calls() -> None:
    step_times = StepTimes(CURVE)
    step_times.observe([4, 1], 3.5)
    assert step_times.slowdown == pytest.approx(1.0)
    step_times.observe([4, 1], 7.0)
    assert step_times.slowdown > 1.0


@pytest.mark.parametrize(
    ("curve", "seconds", "largest"),
    [
        ({1: 1.0, 2: 2.0, 4: 4.0}, 3.0, 3),  # between what was measured
        ({1: 1.0, 8: 1.0, 64: 2.0}, 3.0, 64),  # no further than what was measured
        ({1: 1.0, 8: 8.0}, 1.0, 1),
        ({1: 1.0, 8: 8.0}, 0.5, 0),
        ({16: 1.0, 32: 2.0}, 1.5, 24),  # a row takes as long as the smallest that was measured
    ],
)
def test_the_largest_batch_within_a_time(curve: dict[int, float], seconds: float, largest: int) -> None:
    step_times = StepTimes(curve)
    step_times.slowdown = 7.0
    assert step_times.largest_batch(seconds) == largest
