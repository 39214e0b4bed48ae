import asyncio
import math
import os

import pytest

from scripts.benchmark.endurance import Log, Look, complaint, endure, growth
from scripts.benchmark.services import Running
from scripts.common.errors import ScriptError
from scripts.common.progress import Reporter


def test_growth_is_a_line_that_outliers_do_not_move() -> None:
    looks = [(60.0 * k, 300 + 0.5 * k) for k in range(60)]  # half a megabyte a minute
    looks[20] = (looks[20][0], 900.0)
    assert growth(looks) == pytest.approx(30, rel=0.02)
    assert growth([(15.0 * k, 350.0) for k in range(20)]) == 0


def looks(count: int, **slopes: float) -> list[Look]:
    """A look a minute, with so much more an hour of what is named."""
    start = {"megabytes": 300.0, "descriptors": 20.0, "threads": 12.0}
    return [
        Look(60.0 * k, **{name: value + slopes.get(name, 0.0) * k / 60 for name, value in start.items()})
        for k in range(count)
    ]


def test_only_the_second_half_is_asked_whether_it_grows() -> None:
    log = Log(looks(1)[0], [look._replace(megabytes=300.0 + min(look.at, 3000)) for look in looks(100)], {b"one"})
    log.count(200)
    log.count(200)
    log.count(0)
    found = log.as_json()
    assert (found["megabytes_an_hour"], found["descriptors_an_hour"], found["threads_an_hour"]) == (0, 0, 0)
    assert (found["answers"], found["pictures"], len(found["megabytes"])) == ({"0": 1, "200": 2}, 1, 100)


@pytest.mark.parametrize(
    ("minutes", "slopes", "left", "said"),
    [
        (60, {}, 0, None),
        (60, {"megabytes": 50.0}, 0, None),
        (60, {"megabytes": 70.0}, 0, "megabytes grew"),
        (60, {"descriptors": 9.0, "threads": 3.0}, 0, "descriptors and threads grew"),
        (1, {"megabytes": 70.0}, 0, None),  # too short to tell
        (1, {}, 50, "descriptors were left open"),
    ],
)
def test_what_grows_for_long_is_complained_of(
    minutes: float, slopes: dict[str, float], left: int, said: str | None
) -> None:
    before = looks(1)[0]
    log = Log(before, looks(60, **slopes), {b"one"}, after=before._replace(descriptors=20 + left))
    found = log.as_json() | {"minutes": minutes}
    assert complaint(found) == said


def test_a_picture_that_changes_is_complained_of() -> None:
    found = Log(looks(1)[0], looks(60), {b"one", b"another"}).as_json()
    assert "2 pictures" in str(complaint(found))


def test_a_service_that_is_gone_ends_it_with_one_error() -> None:
    nobody = Running("http://127.0.0.1:9", os.getpid(), 0.0)
    with Reporter() as reporter, pytest.raises(ScriptError, match="under load: ClientConnectorError"):
        asyncio.run(endure(nobody, 60, reporter))


def test_a_single_look_has_no_growth() -> None:
    assert math.isnan(growth([(0.0, 300.0)]))
