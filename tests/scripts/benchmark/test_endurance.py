import asyncio
import os

import pytest

from scripts.benchmark.contestants import BenchError, Running
from scripts.benchmark.endurance import Log, endure, growth
from scripts.progress import Reporter


def test_growth_is_a_line_that_outliers_do_not_move() -> None:
    looks = [(60.0 * k, 300 + 0.5 * k) for k in range(60)]  # half a megabyte a minute
    looks[20] = (looks[20][0], 900.0)
    assert growth(looks) == pytest.approx(30, rel=0.02)
    assert growth([(15.0 * k, 350.0) for k in range(20)]) == 0


def test_only_the_second_half_is_asked_whether_it_grows() -> None:
    log = Log(looks=[(float(k), 300.0 + min(k, 50)) for k in range(100)], pictures={b"one"})
    log.count(200)
    log.count(200)
    log.count(0)
    found = log.as_json()
    assert found["megabytes_an_hour"] == 0
    assert (found["answers"], found["pictures"], len(found["megabytes"])) == ({"0": 1, "200": 2}, 1, 100)


def test_a_service_that_is_gone_ends_it_with_one_error() -> None:
    nobody = Running("http://127.0.0.1:9", os.getpid(), 0.0)
    with Reporter() as reporter, pytest.raises(BenchError, match="under load: ClientConnectorError"):
        asyncio.run(endure(nobody, 60, reporter))
