"""Small requests during a request for 64 images, while other processes use the cores. Needs an idle machine."""

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
from tests.e2e.busy_loops import busy_loops
from tests.e2e.conftest import start_service
from tests.e2e.picture_requests import IMAGE
from tests.e2e.process import TIMEOUT
from tests.e2e.service import Service

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

LARGE: dict[str, Any] = {"digit": 3, "count": 64}
NUM_SMALL = 100  # small requests beside the large ones
NUM_ALONE = 30  # of each kind, without large requests


@pytest.fixture(scope="module")
def shipped() -> Iterator[Service]:
    """A service with the shipped models and default settings."""
    with ExitStack() as stack:
        yield start_service(stack, SHIPPED, OMP_NUM_THREADS="", UNFOG_NUM_THREADS="", UNFOG_COMPILE="auto")


def send(http: httpx.Client, kind: str) -> httpx.Response:
    if kind == "recognition":
        return http.post("/recognize", files={"image": IMAGE})
    steps = {"num_steps": 10, "sampler": "dpmpp"} if kind == "10 steps" else {}
    return http.post("/generate", json={"digit": 7, **steps})


KINDS = ("10 steps", "100 steps", "recognition")


def latencies(service: Service, number: int) -> tuple[dict[str, list[float]], Counter[int]]:
    """Sends small requests one after the other. Returns their latencies by kind, and the number of each status."""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    statuses = Counter[int]()
    with httpx.Client(base_url=service.url, timeout=TIMEOUT) as http:
        for i in range(number):
            kind = KINDS[i % len(KINDS)]
            start = time.monotonic()
            statuses[send(http, kind).status_code] += 1
            found[kind].append(time.monotonic() - start)
    return found, statuses


@contextmanager
def large_requests(service: Service) -> Iterator[list[tuple[int, float]]]:
    """Sends requests for 64 images one after the other. Yields the status and the seconds of each.

    After a refusal the client waits for the time in Retry-After, or until the block ends.
    """
    stop, results = threading.Event(), list[tuple[int, float]]()

    def client() -> None:
        with httpx.Client(base_url=service.url, timeout=700) as http:
            while not stop.is_set():
                start = time.monotonic()
                answer = http.post("/generate", json=LARGE)
                results.append((answer.status_code, time.monotonic() - start))
                stop.wait(float(answer.headers.get("Retry-After", 0)))

    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(client)
        service.wait_until_running()
        try:
            yield results
        finally:
            stop.set()
    sending.result()


@pytest.mark.parametrize("number", [0, 2, 4, 8])
def test_small_requests_are_served_beside_64_images_while_other_processes_use_the_cores(
    shipped: Service, number: int
) -> None:
    with busy_loops(number):
        alone, _ = latencies(shipped, len(KINDS) * NUM_ALONE)
        with large_requests(shipped) as large:
            small, statuses = latencies(shipped, NUM_SMALL)
    seconds = [seconds for _, seconds in large]
    answers = dict(Counter(status for status, _ in large))
    print(f"\n{number} busy loops: small {dict(statuses)}, large {answers} in {min(seconds):.1f}-{max(seconds):.1f} s")
    for kind in KINDS:
        median = statistics.median(alone[kind])
        p95 = sorted(small[kind])[int(0.95 * (len(small[kind]) - 1))]
        print(f"  {kind}: alone {median:.3f} s, beside 64 images p95 {p95:.3f} s, ratio {p95 / median:.2f}")
        assert p95 <= 5 * median, kind
    assert statuses == {200: NUM_SMALL}
    assert answers.keys() == {200}
