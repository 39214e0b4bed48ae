"""The shipped model in a flood of ten times what it can hold: minutes, and seconds that are compared."""

import random
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import psutil
import pytest

from model.checkpoint import SHIPPED
from tests.e2e.conftest import start_service
from tests.e2e.crowd import rush
from tests.e2e.process import eventually
from tests.e2e.service import Service, assert_problem

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

CAPACITY = 256
ONE: dict[str, Any] = {"digit": 7, "seed": 7, "guidance_scale": 1}
HEALTH_SECONDS = 1.0  # within which /health answers all along
LONGER = 1.5  # times as long as before: no more than the machine's own moods
MEGABYTES = 2**20


@pytest.fixture(scope="module")
def shipped() -> Iterator[Service]:
    """As an operator starts it, compiled where it can be, but for time enough."""
    with ExitStack() as stack:
        yield start_service(
            stack,
            SHIPPED,
            OMP_NUM_THREADS="",
            UNFOG_NUM_THREADS="",
            UNFOG_COMPILE="auto",
            UNFOG_QUEUE_CAPACITY=str(CAPACITY),
            UNFOG_REQUEST_TIMEOUT="600",
        )


def flood_of(images: int, seed: int) -> list[dict[str, Any]]:
    choose, bodies = random.Random(seed), []
    while images > 0:
        count = choose.choice([1, 1, 1, 2, 4, 16, 64])
        bodies.append({"digit": choose.randrange(10), "count": count, "num_steps": choose.choice([10, 50, 100])})
        images -= count
    return bodies


def seconds_alone(service: Service) -> float:
    """Of a lone image, the median of a few."""
    seconds = []
    for _ in range(9):
        start = time.monotonic()
        service.images(**ONE)
        seconds.append(time.monotonic() - start)
    return statistics.median(seconds)


def test_a_flood_of_ten_times_the_capacity(shipped: Service, record_property: Any) -> None:
    process = psutil.Process(shipped.process.pid)
    image = shipped.images(**ONE)
    rush(shipped, flood_of(CAPACITY, 0))  # what is kept for good is made by the first
    shipped.wait_until_idle()
    before, resident = seconds_alone(shipped), process.memory_info().rss
    bodies = flood_of(10 * CAPACITY, 1)
    crowd = rush(shipped, bodies)
    at_once = seconds_alone(shipped)
    grown = (process.memory_info().rss - resident) / MEGABYTES
    found = {
        "requests": len(bodies),
        "answered 200": crowd.count(200),
        "answered 429": crowd.count(429),
        "/health, longest of": f"{max(crowd.health_seconds):.3f} s of {len(crowd.health_seconds)}",
        "a lone image before and after": f"{before:.3f} s, {at_once:.3f} s",
        "memory": f"{grown:+.0f} MB",
    }
    for name, value in found.items():
        record_property(name, value)
        print(f"{name}: {value}")
    assert crowd.lost == 0
    assert set(crowd.statuses) == {200, 429}
    assert sum(answer["count"] for answer in crowd.answers if "images" in answer) >= CAPACITY
    assert max(crowd.health_seconds) < HEALTH_SECONDS
    assert grown < 60
    assert at_once < LONGER * before
    assert shipped.images(**ONE) == image


@pytest.mark.parametrize("count", [16, 64])
def test_retry_after_is_when_a_request_of_that_size_would_fit(shipped: Service, count: int) -> None:
    """If nobody else comes: within a factor of two, or a second, which is what whole seconds allow."""
    shipped.wait_until_idle()
    with ThreadPoolExecutor(2 * CAPACITY) as pool:
        refused = fill_up(shipped, pool, count)
        said, asked_at = int(refused.headers["retry-after"]), time.monotonic()
        eventually(lambda: CAPACITY - shipped.metrics().of("queue_depth_images") >= count, "it would fit")
        took = time.monotonic() - asked_at
        print(f"{count} images: Retry-After {said} s, it took {took:.1f} s")
        assert took / 2 - 1 <= said <= 2 * took + 1
        if count >= 64:  # a wait of seconds, of which a factor says something
            assert took > 2


def fill_up(service: Service, pool: ThreadPoolExecutor, count: int) -> httpx.Response:
    """More requests of so many images than fit, at once; the first that was refused."""
    body = {"digit": 3, "count": count, "guidance_scale": 1}
    asked = [pool.submit(service.post, body) for _ in range((CAPACITY + 128) // count + 16)]  # also what runs

    def refused() -> list[httpx.Response]:
        answers = [future.result() for future in asked if future.done()]
        return [answer for answer in answers if answer.status_code == 429]

    eventually(refused, "one is refused")
    assert_problem(refused()[0], 429, "overloaded")
    return refused()[0]
