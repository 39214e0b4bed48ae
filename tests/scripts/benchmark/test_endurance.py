import asyncio
import math
import os

import pytest

from scripts.benchmark.endurance import Log, ResourceSample, endure, growth, problem_in
from scripts.benchmark.services import Running
from scripts.common.errors import ScriptError
from scripts.common.progress import Reporter


def test_growth_is_a_slope_that_outliers_do_not_change() -> None:
    samples = [(60.0 * k, 300 + 0.5 * k) for k in range(60)]  # half a megabyte per minute
    samples[20] = (samples[20][0], 900.0)
    assert growth(samples) == pytest.approx(30, rel=0.02)
    assert growth([(15.0 * k, 350.0) for k in range(20)]) == 0


def samples(count: int, **slopes: float) -> list[ResourceSample]:
    """Returns one sample per minute. `slopes` are the growth per hour of the named resources."""
    start = {"megabytes": 300.0, "descriptors": 20.0, "threads": 12.0}
    return [
        ResourceSample(60.0 * k, **{name: value + slopes.get(name, 0.0) * k / 60 for name, value in start.items()})
        for k in range(count)
    ]


def test_growth_is_measured_in_the_second_half_only() -> None:
    log = Log(
        samples(1)[0], [sample._replace(megabytes=300.0 + min(sample.at, 3000)) for sample in samples(100)], {b"one"}
    )
    log.count(200)
    log.count(200)
    log.count(0)
    found = log.as_json()
    assert (found["megabytes_an_hour"], found["descriptors_an_hour"], found["threads_an_hour"]) == (0, 0, 0)
    assert (found["answers"], found["pictures"], len(found["megabytes"])) == ({"0": 1, "200": 2}, 1, 100)


@pytest.mark.parametrize(
    ("minutes", "slopes", "left", "problem"),
    [
        (60, {}, 0, None),
        (60, {"megabytes": 50.0}, 0, None),
        (60, {"megabytes": 70.0}, 0, "Possible leak: megabytes grew by 70.0 per hour (limit 60)"),
        (120, {"megabytes": 4.0}, 0, None),
        (120, {"megabytes": 6.0}, 0, "Possible leak: megabytes grew by 6.0 per hour (limit 5)"),
        (
            60,
            {"descriptors": 9.0, "threads": 3.0},
            0,
            "Possible leak: descriptors grew by 9.0 per hour (limit 6), threads grew by 3.0 per hour (limit 2)",
        ),
        (1, {"megabytes": 70.0}, 0, None),  # too short for a check of growth
        (1, {}, 50, "Descriptors were left open: 70 after the load, 20 before it"),
    ],
)
def test_problem_in_names_resources_that_grow(
    minutes: float, slopes: dict[str, float], left: int, problem: str | None
) -> None:
    before = samples(1)[0]
    log = Log(before, samples(60, **slopes), {b"one"}, after=before._replace(descriptors=20 + left))
    found = log.as_json() | {"minutes": minutes}
    assert problem_in(found) == problem


def test_problem_in_reports_a_changed_image() -> None:
    found = Log(samples(1)[0], samples(60), {b"one", b"another"}).as_json()
    assert "2 different images" in str(problem_in(found))


def test_problem_in_names_unexpected_statuses() -> None:
    log = Log(samples(1)[0], samples(60), {b"one"}, {0: 1, 200: 5, 422: 1, 429: 2, 500: 1, 504: 3})
    assert problem_in(log.as_json()) == "Answers with unexpected status under load: 500, 504"


def test_endure_fails_with_one_error_if_the_service_is_gone() -> None:
    gone = Running("http://127.0.0.1:9", os.getpid(), 0.0)
    with Reporter() as reporter, pytest.raises(ScriptError, match="under load: ConnectionRefusedError"):
        asyncio.run(endure(gone, 60, reporter))


def test_growth_of_a_single_sample_is_nan() -> None:
    assert math.isnan(growth([(0.0, 300.0)]))
