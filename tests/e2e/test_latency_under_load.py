"""The shipped model under mixed load: deadlines are met and small requests stay fast. Needs an idle machine."""

import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest

from model.spec import SHIPPED
from tests.e2e.conftest import start_service
from tests.e2e.process import TIMEOUT
from tests.e2e.service import Service

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ONE: dict[str, Any] = {"digit": 7}
LARGE: dict[str, Any] = {"digit": 3, "count": 64}
NUM_LARGE = 20
REPEATS = 5


@pytest.fixture(scope="module")
def shipped() -> Iterator[Service]:
    """A service with the shipped model and default settings."""
    with ExitStack() as stack:
        yield start_service(stack, SHIPPED, OMP_NUM_THREADS="", UNFOG_NUM_THREADS="", UNFOG_COMPILE="auto")


def seconds(service: Service, body: dict[str, Any]) -> float:
    start = time.monotonic()
    service.images(**body)
    return time.monotonic() - start


@contextmanager
def looping_clients(service: Service, number: int, body: dict[str, Any]) -> Iterator[Counter[int]]:
    """Runs `number` clients that send the request in a loop. Yields the counts of their response statuses."""
    stop, statuses = threading.Event(), Counter[int]()

    def client() -> None:
        with httpx.Client(base_url=service.url, timeout=TIMEOUT) as http:
            while not stop.is_set():
                response = http.post("/generate", json=body)
                statuses[response.status_code] += 1
                if response.status_code == 429:
                    stop.wait(float(response.headers["retry-after"]))

    with ThreadPoolExecutor(number) as pool:
        clients = [pool.submit(client) for _ in range(number)]
        try:
            yield statuses
        finally:
            stop.set()
    for each in clients:
        each.result()


@pytest.mark.parametrize("num_small", [4, 15])
def test_large_request_among_small_ones_meets_its_deadline_or_is_429(shipped: Service, num_small: int) -> None:
    alone = statistics.median(seconds(shipped, LARGE) for _ in range(3))
    large, rejection_seconds = Counter[int](), list[float]()
    with looping_clients(shipped, num_small, ONE) as small:
        while sum(large.values()) < NUM_LARGE:
            start = time.monotonic()
            response = shipped.post({**LARGE, "timeout_seconds": 2.5 * alone})
            large[response.status_code] += 1
            if response.status_code == 429:
                rejection_seconds.append(time.monotonic() - start)
                time.sleep(float(response.headers["retry-after"]))
    print(f"{num_small} small clients: alone {alone:.2f} s, large {dict(large)}, small {dict(small)}")
    assert set(large) <= {200, 429}
    assert large[200] >= NUM_LARGE / 2
    assert set(small) <= {200, 429}
    assert max(rejection_seconds, default=0.0) < 1.0


def test_single_image_stays_fast_while_64_images_run(shipped: Service) -> None:
    idle = statistics.median(seconds(shipped, ONE) for _ in range(15))
    with looping_clients(shipped, 1, LARGE):
        shipped.wait_until_running()
        shared = statistics.median(seconds(shipped, ONE) for _ in range(30))
    print(f"idle {idle:.3f} s, while 64 run {shared:.3f} s: {shared / idle:.2f} times")
    assert shared <= 3.5 * idle
