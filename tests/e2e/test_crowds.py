"""More clients than there is room for, clients that vanish in hordes, and the end in the midst of them."""

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

from tests.e2e.conftest import Start, start_service
from tests.e2e.crowd import rush, vanish
from tests.e2e.process import PATIENCE, eventually
from tests.e2e.service import Service

CAPACITY = 64
ALONE = {"digit": 3, "count": 2, "seed": 33}
MEGABYTES = 2**20


@pytest.fixture(scope="module")
def small(checkpoint: Path) -> Iterator[Service]:
    """A small queue; time enough for all that is admitted."""
    with ExitStack() as stack:
        yield start_service(
            stack,
            checkpoint,
            UNFOG_MAX_BATCH="8",
            UNFOG_QUEUE_CAPACITY=str(CAPACITY),
            UNFOG_REQUEST_TIMEOUT="600",
        )


def ten_times_too_many(seed: int) -> list[dict[str, Any]]:
    """Requests of ten times as many images as may wait, of 1 to 16 each."""
    choose, bodies, images = random.Random(seed), [], 0
    while images < 10 * CAPACITY:
        count = choose.choice([1, 1, 2, 4, 8, 16])
        bodies.append({"digit": choose.randrange(10), "count": count, "seed": len(bodies), "num_steps": 50})
        images += count
    return bodies


def resident(service: Service) -> int:
    return int(psutil.Process(service.process.pid).memory_info().rss)


def test_a_flood_is_answered_what_was_admitted_with_images_and_the_rest_with_when_to_come_again(
    small: Service,
) -> None:
    before, bodies = small.metrics(), ten_times_too_many(0)
    crowd = rush(small, bodies)
    assert crowd.lost == 0
    assert set(crowd.statuses) == {200, 429}
    assert len(crowd.statuses) == len(bodies)
    for answer in crowd.answers:
        if "images" in answer:
            assert [image["index"] for image in answer["images"]] == list(range(answer["count"]))
        else:
            assert (answer["status"], answer["code"]) == (429, "overloaded")
    assert len(crowd.retry_after) == crowd.count(429)
    assert min(crowd.retry_after) >= 1
    after = small.metrics()
    assert after.of("rejected_total", reason="overloaded") - before.of("rejected_total", reason="overloaded") == (
        crowd.count(429)
    )
    drawn = sum(answer["count"] for answer in crowd.answers if "images" in answer)
    assert drawn >= CAPACITY  # what fits is taken
    images = sum(
        after.of("images_total", digit=str(digit)) - before.of("images_total", digit=str(digit)) for digit in range(10)
    )
    assert images == drawn
    assert len(crowd.health_seconds) > 1
    small.wait_until_idle()


def test_the_bytes_are_the_same_in_a_flood(small: Service) -> None:
    alone = {body["seed"]: body for body in ten_times_too_many(1)}
    crowd = rush(small, list(alone.values()))
    drawn = [answer for answer in crowd.answers if "images" in answer]
    for answer in random.Random(0).sample(drawn, 5):
        assert small.images(**alone[answer["seed"]]) == pngs_of(answer)


def pngs_of(answer: dict[str, Any]) -> list[bytes]:
    return [base64.b64decode(image["png"]) for image in answer["images"]]


def test_floods_leave_no_memory_behind(small: Service) -> None:
    rush(small, ten_times_too_many(2))  # what is kept for good is made by the first
    small.wait_until_idle()
    before = resident(small)
    for seed in range(2):
        rush(small, ten_times_too_many(seed))
    small.wait_until_idle()
    assert resident(small) - before < 30 * MEGABYTES


def test_hordes_that_vanish_leave_nothing_behind(small: Service) -> None:
    wanted = small.images(**ALONE)
    process = psutil.Process(small.process.pid)
    files, threads = process.num_fds(), process.num_threads()
    for seed in range(3):
        vanish(small, {"digit": 1, "count": 4}, count=100, seed=seed)
        assert small.images(**ALONE) == wanted
    small.wait_until_idle()
    eventually(lambda: process.num_fds() <= files + 1, "no descriptor is left open")
    assert process.num_threads() <= threads + os.cpu_count() + 4  # of the pool that encodes, which has an end
    queue = small.client.get("/health").json()["queue"]
    assert (queue["waiting"], queue["running"]) == (0, 0)
    assert small.post({"digit": 1, "count": CAPACITY, "num_steps": 1}).status_code == 200  # all of the room is back


def test_sigterm_at_the_peak_loses_nothing_that_was_admitted(start: Start) -> None:
    service = start(
        UNFOG_MAX_BATCH="8", UNFOG_QUEUE_CAPACITY="64", UNFOG_REQUEST_TIMEOUT="600", UNFOG_DRAIN_TIMEOUT="600"
    )
    bodies = ten_times_too_many(3)
    with ThreadPoolExecutor() as pool:
        crowd_of = pool.submit(rush, service, bodies)
        eventually(lambda: service.metrics().of("rejected_total", reason="overloaded") > 0, "it is at its peak")
        service.process.signal(signal.SIGTERM)
        crowd = crowd_of.result(10 * PATIENCE)
    assert service.process.wait() == 0
    assert not [line for line in service.process.lines if '"level": "error"' in line or "Traceback" in line]
    assert crowd.lost == 0
    assert set(crowd.statuses) <= {200, 429, 503}
    assert len(crowd.statuses) == len(bodies)
    assert {answer["code"] for answer in crowd.answers if answer.get("status") == 503} <= {"draining"}
    assert sum(answer["count"] for answer in crowd.answers if "images" in answer) >= CAPACITY - 16


def test_sigterm_at_the_peak_answers_also_what_there_is_no_time_for(start: Start) -> None:
    service = start(
        UNFOG_MAX_BATCH="1", UNFOG_QUEUE_CAPACITY="64", UNFOG_REQUEST_TIMEOUT="600", UNFOG_DRAIN_TIMEOUT="0.2"
    )
    bodies = [body | {"num_steps": 100} for body in ten_times_too_many(4)]
    with ThreadPoolExecutor() as pool:
        crowd_of = pool.submit(rush, service, bodies)
        eventually(lambda: service.metrics().of("rejected_total", reason="overloaded") > 0, "it is at its peak")
        service.process.signal(signal.SIGTERM)
        crowd = crowd_of.result(PATIENCE)
    assert service.process.wait() == 0
    assert not [line for line in service.process.lines if '"level": "error"' in line or "Traceback" in line]
    assert crowd.lost == 0
    assert crowd.count(503) > 0
    assert {answer["code"] for answer in crowd.answers if answer.get("status") == 503} == {"draining"}
