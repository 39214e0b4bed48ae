"""Overload: more images than the queue holds, many disconnecting clients, and SIGTERM at peak load."""

import base64
import os
import random
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.concurrent_clients import send_all, send_and_disconnect
from tests.e2e.conftest import Start, start_service
from tests.e2e.process import TIMEOUT, wait_until
from tests.e2e.service import Service

CAPACITY = 64
ALONE = {"digit": 3, "count": 2, "seed": 33}
MEGABYTES = 2**20


@pytest.fixture(scope="module")
def small_queue(checkpoint: Path) -> Iterator[Service]:
    """A service with a small queue and a timeout that every admitted request meets."""
    with ExitStack() as stack:
        yield start_service(
            stack,
            checkpoint,
            UNFOG_MAX_BATCH="8",
            UNFOG_QUEUE_CAPACITY=str(CAPACITY),
            UNFOG_REQUEST_TIMEOUT="600",
        )


def ten_times_the_capacity(seed: int) -> list[dict[str, Any]]:
    """Returns requests of 1 to 16 images each, with ten times as many images in total as the queue holds."""
    choose, bodies, images = random.Random(seed), [], 0
    while images < 10 * CAPACITY:
        count = choose.choice([1, 1, 2, 4, 8, 16])
        bodies.append({"digit": choose.randrange(10), "count": count, "seed": len(bodies), "num_steps": 20})
        images += count
    return bodies


def resident_bytes(service: Service) -> int:
    return int(psutil.Process(service.process.pid).memory_info().rss)


def test_overload_completes_admitted_requests_and_rejects_the_rest_with_retry_after(small_queue: Service) -> None:
    before, bodies = small_queue.metrics(), ten_times_the_capacity(0)
    results = send_all(small_queue, bodies)
    assert results.lost == 0
    assert set(results.statuses) == {200, 429}
    assert len(results.statuses) == len(bodies)
    for response in results.bodies:
        if "images" in response:
            assert [image["index"] for image in response["images"]] == list(range(response["count"]))
        else:
            assert (response["status"], response["code"]) == (429, "overloaded")
    assert len(results.retry_after) == results.count(429)
    assert min(results.retry_after) >= 1
    after = small_queue.metrics()
    assert after.value("rejected_total", reason="overloaded") - before.value("rejected_total", reason="overloaded") == (
        results.count(429)
    )
    generated = sum(response["count"] for response in results.bodies if "images" in response)
    assert generated >= CAPACITY  # the whole capacity is used
    images = sum(
        after.value("images_total", digit=str(digit)) - before.value("images_total", digit=str(digit))
        for digit in range(10)
    )
    assert images == generated
    assert len(results.health_seconds) > 1
    small_queue.wait_until_idle()


def test_image_bytes_are_the_same_under_overload(small_queue: Service) -> None:
    alone = {body["seed"]: body for body in ten_times_the_capacity(1)}
    results = send_all(small_queue, list(alone.values()))
    generated = [response for response in results.bodies if "images" in response]
    for response in random.Random(0).sample(generated, 5):
        assert small_queue.images(**alone[response["seed"]]) == pngs_in(response)


def pngs_in(response: dict[str, Any]) -> list[bytes]:
    return [base64.b64decode(image["png"]) for image in response["images"]]


def test_overload_does_not_leak_memory(small_queue: Service) -> None:
    send_all(small_queue, ten_times_the_capacity(2))  # fills caches and thread pools
    small_queue.wait_until_idle()
    before = resident_bytes(small_queue)
    for seed in range(2):
        send_all(small_queue, ten_times_the_capacity(seed))
    small_queue.wait_until_idle()
    assert resident_bytes(small_queue) - before < 30 * MEGABYTES


def test_300_disconnecting_clients_leak_nothing(small_queue: Service) -> None:
    expected = small_queue.images(**ALONE)
    process = psutil.Process(small_queue.process.pid)
    files, threads = process.num_fds(), process.num_threads()
    for seed in range(3):
        send_and_disconnect(small_queue, {"digit": 1, "count": 4}, count=100, seed=seed)
        assert small_queue.images(**ALONE) == expected
    small_queue.wait_until_idle()
    wait_until(lambda: process.num_fds() <= files + 1, "all descriptors are closed")
    assert process.num_threads() <= threads + os.cpu_count() + 4  # the encoder pool may have grown to its maximum
    queue = small_queue.client.get("/health").json()["queue"]
    assert (queue["waiting"], queue["running"]) == (0, 0)
    # The whole capacity is free again.
    assert small_queue.post({"digit": 1, "count": CAPACITY, "num_steps": 1}).status_code == 200


def test_sigterm_under_overload_completes_all_admitted_requests(start: Start) -> None:
    service = start(
        UNFOG_MAX_BATCH="8", UNFOG_QUEUE_CAPACITY="64", UNFOG_REQUEST_TIMEOUT="600", UNFOG_DRAIN_TIMEOUT="600"
    )
    bodies = ten_times_the_capacity(3)
    with ThreadPoolExecutor() as pool:
        pending = pool.submit(send_all, service, bodies)
        wait_until(lambda: service.metrics().value("rejected_total", reason="overloaded") > 0, "requests are rejected")
        service.process.signal(signal.SIGTERM)
        results = pending.result(10 * TIMEOUT)
    assert service.process.wait() == 0
    assert not [line for line in service.process.lines if '"level": "error"' in line or "Traceback" in line]
    assert results.lost == 0
    assert set(results.statuses) <= {200, 429, 503}
    assert len(results.statuses) == len(bodies)
    assert {response["code"] for response in results.bodies if response.get("status") == 503} <= {"draining"}
    assert sum(response["count"] for response in results.bodies if "images" in response) >= CAPACITY - 16


def test_sigterm_under_overload_answers_503_after_the_drain_timeout(start: Start) -> None:
    service = start(
        UNFOG_MAX_BATCH="1", UNFOG_QUEUE_CAPACITY="64", UNFOG_REQUEST_TIMEOUT="600", UNFOG_DRAIN_TIMEOUT="0.2"
    )
    bodies = [body | {"num_steps": 100} for body in ten_times_the_capacity(4)]
    with ThreadPoolExecutor() as pool:
        pending = pool.submit(send_all, service, bodies)
        wait_until(lambda: service.metrics().value("rejected_total", reason="overloaded") > 0, "requests are rejected")
        service.process.signal(signal.SIGTERM)
        results = pending.result(TIMEOUT)
    assert service.process.wait() == 0
    assert not [line for line in service.process.lines if '"level": "error"' in line or "Traceback" in line]
    assert results.lost == 0
    assert results.count(503) > 0
    assert {response["code"] for response in results.bodies if response.get("status") == 503} == {"draining"}
