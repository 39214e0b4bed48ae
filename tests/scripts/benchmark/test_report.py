import math
from dataclasses import replace

import pytest

from scripts.benchmark.load import Answer
from scripts.benchmark.report import Window, percentile, with_spread


def answer(planned: float, done: float, *, images: int = 1, kind: str = "one", status: int = 200) -> Answer:
    return Answer(kind, images, planned, planned, done, status, None)


WINDOW = Window(
    10,
    20,
    (
        answer(8, 12, images=4),  # half before, half within
        answer(11, 13, images=2),
        answer(12, 19, kind="two"),
        answer(18, 25),  # two sevenths within
        answer(19, 19.5, images=64, status=429),
    ),
    due_from=10,
)


def test_images_count_as_far_as_they_were_drawn_within_and_latencies_where_they_were_due() -> None:
    assert WINDOW.images_a_second == pytest.approx((4 * 2 / 4 + 2 + 1 + 2 / 7) / 10)
    assert WINDOW.latencies() == [2, 7, 7, 0.5]
    assert WINDOW.latencies("two") == [7]
    assert replace(WINDOW, due_from=8).latencies() == [4, 2, 7, 7, 0.5]


def test_goodput_is_what_was_answered_in_time() -> None:
    assert WINDOW.goodput(2) == pytest.approx(2 / 10)
    assert WINDOW.goodput(7) == pytest.approx((2 + 1 + 1) / 10)
    assert WINDOW.failures == 1


def test_percentiles() -> None:
    values = list(range(100, 0, -1))
    assert [percentile(values, share) for share in (0, 0.5, 0.95, 0.99, 1)] == [1, 51, 96, 100, 100]
    assert math.isnan(percentile([], 0.5))


def test_a_figure_has_its_median_and_its_range() -> None:
    assert with_spread([3.0, 1.0, 2.0]) == "2 (1 - 3)"
    assert with_spread([1.23456]) == "1.23"
