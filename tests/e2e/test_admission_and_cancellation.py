"""Admission by queue capacity and deadline, and cancellation when a deadline passes or a client disconnects."""

import json
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import start_service
from tests.e2e.process import TIMEOUT, wait_until
from tests.e2e.service import JSON, Service, assert_invalid, assert_problem

CAPACITY = 32
FULL = {"digit": 6, "count": CAPACITY}  # fills the queue; with one row per step it needs thousands of steps
CHEAP = {"digit": 7, "num_steps": 1}


@pytest.fixture(scope="module")
def one_row_service(checkpoint: Path) -> Iterator[Service]:
    """A service with one row per step and a small queue, so that one request keeps it busy."""
    with ExitStack() as stack:
        yield start_service(
            stack,
            checkpoint,
            UNFOG_MAX_BATCH="1",
            UNFOG_QUEUE_CAPACITY=str(CAPACITY),
            UNFOG_REQUEST_TIMEOUT="600",
        )


@pytest.fixture(autouse=True)
def _idle(one_row_service: Service) -> Iterator[None]:
    yield
    one_row_service.wait_until_idle()


def cancelled(service: Service) -> float:
    metrics = service.metrics()
    return sum(metrics.value("cancelled_total", stage=stage) for stage in ("waiting", "running"))


def first(events: Iterator[tuple[str, dict[str, Any]]], wanted: str) -> dict[str, Any]:
    """Returns the data of the next event with this name."""
    return next(data for name, data in events if name == wanted)


def test_count_above_the_queue_capacity_is_422_instead_of_429(one_row_service: Service) -> None:
    assert_invalid(one_row_service.post({**CHEAP, "count": CAPACITY + 1}), "body", "count")
    assert one_row_service.post({**CHEAP, "count": CAPACITY}).status_code == 200


def test_full_queue_is_429_and_admits_again_when_it_has_room(one_row_service: Service) -> None:
    before = one_row_service.metrics().value("rejected_total", reason="overloaded")
    with one_row_service.events(FULL) as events:
        assert first(events, "accepted")["position"] == 0
        response = one_row_service.post({**CHEAP, "count": CAPACITY})
        assert_problem(response, 429, "overloaded")
        assert "no room" in response.json()["detail"]
        assert int(response.headers["retry-after"]) >= 1
        assert one_row_service.metrics().value("rejected_total", reason="overloaded") == before + 1
        health = one_row_service.client.get("/health").json()["queue"]
        assert health["waiting"] + health["running"] <= CAPACITY  # a request is never admitted in part
        assert one_row_service.client.get("/livez").status_code == 200
    one_row_service.wait_until_idle()
    assert one_row_service.post({**CHEAP, "count": CAPACITY}).status_code == 200


def test_request_that_cannot_meet_its_deadline_is_429_immediately(one_row_service: Service) -> None:
    before = one_row_service.metrics().value("rejected_total", reason="overloaded")
    with one_row_service.events({"digit": 1}) as events:
        alone = first(events, "accepted")["eta_seconds"]
    one_row_service.wait_until_idle()
    with one_row_service.events(FULL) as events:
        one_row_service.wait_until_running()  # the queue then has room for one image
        response = one_row_service.post({"digit": 1, "timeout_seconds": alone / 2})
        assert_problem(response, 429, "overloaded")
        assert "deadline" in response.json()["detail"]
        assert int(response.headers["retry-after"]) >= 1
    assert one_row_service.metrics().value("rejected_total", reason="overloaded") == before + 1


def test_request_with_an_earlier_deadline_overtakes_a_queued_one(one_row_service: Service) -> None:
    with one_row_service.events(FULL) as events:
        backlog = first(events, "accepted")["eta_seconds"]
        one_row_service.wait_until_running()  # the queue then has room for one image
        assert one_row_service.post({"digit": 1, "timeout_seconds": backlog / 2}).status_code == 200
        assert (
            one_row_service.metrics().value("running_images") + one_row_service.metrics().value("queue_depth_images")
            > CAPACITY / 2
        )


def test_expired_deadline_is_504_and_frees_the_rows(one_row_service: Service) -> None:
    """Stops the process with SIGSTOP until the deadline has passed, which simulates a stalled machine."""
    body = {"digit": 1, "count": 8, "num_steps": 15}
    with one_row_service.events(body) as events:
        eta = first(events, "accepted")["eta_seconds"]
    one_row_service.wait_until_idle()
    before, left_before = one_row_service.metrics(), cancelled(one_row_service)
    body["timeout_seconds"] = 5 * eta + 2  # enough for both requests when the machine becomes twice as slow
    with one_row_service.events(body) as running, one_row_service.events(body) as waiting:
        first(running, "accepted")
        first(waiting, "accepted")
        one_row_service.process.signal(signal.SIGSTOP)
        try:
            time.sleep(body["timeout_seconds"])
        finally:
            one_row_service.process.signal(signal.SIGCONT)
        problems = [list(events)[-1] for events in (running, waiting)]
    assert [(name, problem["code"], problem["status"]) for name, problem in problems] == [
        ("error", "deadline_exceeded", 504)
    ] * 2
    one_row_service.wait_until_idle()
    assert 8 < cancelled(one_row_service) - left_before <= 16
    after = one_row_service.metrics()
    assert after.value("rejected_total", reason="deadline") - before.value("rejected_total", reason="deadline") == 2
    assert one_row_service.post(CHEAP).status_code == 200


def test_client_that_disconnects_frees_its_rows(one_row_service: Service) -> None:
    before = cancelled(one_row_service)
    content = json.dumps({"digit": 1, "count": CAPACITY}).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Type: {JSON}\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.create_connection(one_row_service.address, timeout=TIMEOUT) as connection:
        connection.sendall(head.encode() + content)
        one_row_service.wait_until_running()
    one_row_service.wait_until_idle()
    assert 0 < cancelled(one_row_service) - before <= CAPACITY


def test_client_that_closes_its_stream_frees_only_its_own_rows(one_row_service: Service) -> None:
    before = one_row_service.metrics()
    with ThreadPoolExecutor() as pool:
        with one_row_service.events({"digit": 1, "count": 16}) as events:
            first(events, "progress")
            other = pool.submit(one_row_service.post, {"digit": 2, "count": 2, "num_steps": 10})
            wait_until(
                lambda: one_row_service.metrics().value("queue_depth_images") >= 2, "the other request is admitted"
            )
        assert other.result(TIMEOUT).status_code == 200
    one_row_service.wait_until_idle()
    after = one_row_service.metrics()
    assert after.value("cancelled_total", stage="running") > before.value("cancelled_total", stage="running")
    assert after.value("cancelled_total", stage="waiting") > before.value("cancelled_total", stage="waiting")
    assert after.value("images_total", digit="2") - before.value("images_total", digit="2") == 2


def test_new_request_joins_the_next_step(service: Service) -> None:
    """The request arrives while the running images fill all rows of the step."""
    service.wait_until_idle()
    with service.events({"digit": 1, "count": 64}) as events:
        first(events, "progress")
        before = service.metrics()
        assert service.post({"digit": 2}).status_code == 200
        after = service.metrics()
    waited = {
        bound: after.value("admission_wait_steps_bucket", le=bound)
        - before.value("admission_wait_steps_bucket", le=bound)
        for bound in ("1.0", "+Inf")
    }
    assert waited == {"1.0": 1, "+Inf": 1}  # it waits at most for the step that runs when it arrives
