"""The shipped model at ten times its queue capacity. Takes minutes and compares times."""

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

from model.spec import SHIPPED
from tests.e2e.concurrent_clients import send_all
from tests.e2e.conftest import start_service
from tests.e2e.process import wait_until
from tests.e2e.service import Service, assert_problem

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

CAPACITY = 256
ONE: dict[str, Any] = {"digit": 7, "seed": 7, "guidance_scale": 1}
HEALTH_SECONDS = 1.0  # the longest permitted latency of /health
MAX_SLOWDOWN = 1.5  # limit for a single image after the overload; includes variations of the machine
MEGABYTES = 2**20


@pytest.fixture(scope="module")
def shipped() -> Iterator[Service]:
    """A service with the shipped model, compiled if possible, and a long request timeout."""
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


def requests_of(images: int, seed: int) -> list[dict[str, Any]]:
    choose, bodies = random.Random(seed), []
    while images > 0:
        count = choose.choice([1, 1, 1, 2, 4, 16, 64])
        bodies.append({"digit": choose.randrange(10), "count": count, "num_steps": choose.choice([10, 50, 100])})
        images -= count
    return bodies


def single_image_seconds(service: Service) -> float:
    """Returns the median latency of a single image in seconds."""
    seconds = []
    for _ in range(9):
        start = time.monotonic()
        service.images(**ONE)
        seconds.append(time.monotonic() - start)
    return statistics.median(seconds)


def test_overload_of_ten_times_the_capacity_does_not_delay_health_or_later_images(
    shipped: Service, record_property: Any
) -> None:
    process = psutil.Process(shipped.process.pid)
    image = shipped.images(**ONE)
    send_all(shipped, requests_of(CAPACITY, 0))  # fills caches and thread pools
    shipped.wait_until_idle()
    before, resident = single_image_seconds(shipped), process.memory_info().rss
    bodies = requests_of(10 * CAPACITY, 1)
    results = send_all(shipped, bodies)
    after = single_image_seconds(shipped)
    growth = (process.memory_info().rss - resident) / MEGABYTES
    found = {
        "requests": len(bodies),
        "status 200": results.count(200),
        "status 429": results.count(429),
        "longest /health latency": f"{max(results.health_seconds):.3f} s of {len(results.health_seconds)} requests",
        "single image before and after": f"{before:.3f} s, {after:.3f} s",
        "memory growth": f"{growth:+.0f} MB",
    }
    for name, value in found.items():
        record_property(name, value)
        print(f"{name}: {value}")
    assert results.lost == 0
    assert set(results.statuses) == {200, 429}
    assert sum(response["count"] for response in results.bodies if "images" in response) >= CAPACITY
    assert max(results.health_seconds) < HEALTH_SECONDS
    assert growth < 60
    assert after < MAX_SLOWDOWN * before
    assert shipped.images(**ONE) == image


@pytest.mark.parametrize("count", [16, 64])
def test_retry_after_predicts_when_the_request_would_fit(shipped: Service, count: int) -> None:
    """Without other requests, Retry-After is right within a factor of two plus one second of rounding."""
    shipped.wait_until_idle()
    with ThreadPoolExecutor(2 * CAPACITY) as pool:
        rejected = fill_up(shipped, pool, count)
        retry_after, start = int(rejected.headers["retry-after"]), time.monotonic()
        wait_until(lambda: CAPACITY - shipped.metrics().value("queue_depth_images") >= count, "the request would fit")
        took = time.monotonic() - start
        print(f"{count} images: Retry-After {retry_after} s, room after {took:.1f} s")
        assert took / 2 - 1 <= retry_after <= 2 * took + 1
        if count >= 64:  # long enough for the factor of two to be meaningful
            assert took > 2


def fill_up(service: Service, pool: ThreadPoolExecutor, count: int) -> httpx.Response:
    """Sends enough concurrent requests of `count` images to overflow the queue. Returns a rejected response."""
    body = {"digit": 3, "count": count, "guidance_scale": 1}
    num_requests = (CAPACITY + 128) // count + 16  # up to 128 images run and do not count as queued
    pending = [pool.submit(service.post, body) for _ in range(num_requests)]

    def rejections() -> list[httpx.Response]:
        responses = [future.result() for future in pending if future.done()]
        return [response for response in responses if response.status_code == 429]

    wait_until(rejections, "a request is rejected")
    assert_problem(rejections()[0], 429, "overloaded")
    return rejections()[0]
