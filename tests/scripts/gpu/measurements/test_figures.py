"""Tests of figures, targets and checks."""

from collections.abc import Iterator

import pytest

from app.engine.interface import DeviceLostError
from scripts.gpu.measurements.figures import Figure, Skipped, Target, checked, guarded


@pytest.mark.parametrize(("value", "met"), [(19.0, True), (20.0, True), (20.1, False)])
def test_target_at_most(value: float, met: bool) -> None:
    content = Figure("start", value, "s", Target(20.0)).as_json()
    assert content == {"name": "start", "value": value, "unit": "s", "target": "at most 20", "met": met}


def test_target_at_least() -> None:
    assert not Target(5000, is_at_most=False).is_met(4999)
    assert Target(5000, is_at_most=False).is_met(5000)


def test_value_zero_and_failed_check_are_written() -> None:
    assert Figure("waits", 0, passed=False).as_json() == {"name": "waits", "value": 0, "passed": False}


def test_check_fails_with_the_first_line_of_an_error() -> None:
    with checked("image") as check:
        raise ValueError("wrong\nmore")
    assert check.figure == Figure("image", "ValueError: wrong", passed=False)
    with checked("image") as check:
        pass
    assert check.figure == Figure("image", "ok", passed=True)


def figures(error: Exception) -> Iterator[Figure]:
    yield Figure("first", 1)
    raise error


def test_error_of_a_part_becomes_a_failed_check_after_its_figures() -> None:
    found = list(guarded("part", figures(RuntimeError("broken"))))
    assert found == [Figure("first", 1), Figure("part", "RuntimeError: broken", passed=False)]


@pytest.mark.parametrize("error", [Skipped("no GPU"), DeviceLostError("lost")])
def test_lost_device_and_skip_are_raised_again(error: Exception) -> None:
    with pytest.raises(type(error)):
        list(guarded("part", figures(error)))
