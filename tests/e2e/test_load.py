"""Too much work, too little time, clients that leave: who is refused, and that nothing stays behind."""

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
from tests.e2e.process import PATIENCE, eventually
from tests.e2e.service import JSON, Service, assert_invalid, assert_problem

CAPACITY = 32
FULL = {"digit": 6, "count": CAPACITY}  # as much as may wait, and thousands of steps of one row
CHEAP = {"digit": 7, "num_steps": 1}


@pytest.fixture(scope="module")
def narrow(checkpoint: Path) -> Iterator[Service]:
    """One row a step and a small queue: a single request keeps it busy."""
    with ExitStack() as stack:
        yield start_service(
            stack,
            checkpoint,
            UNFOG_MAX_BATCH="1",
            UNFOG_QUEUE_CAPACITY=str(CAPACITY),
            UNFOG_REQUEST_TIMEOUT="600",
        )


@pytest.fixture(autouse=True)
def _idle(narrow: Service) -> Iterator[None]:
    yield
    narrow.wait_until_idle()


def cancelled(service: Service) -> float:
    metrics = service.metrics()
    return sum(metrics.of("cancelled_total", stage=stage) for stage in ("waiting", "running"))


def first(events: Iterator[tuple[str, dict[str, Any]]], wanted: str) -> dict[str, Any]:
    """The next event of that name."""
    return next(data for name, data in events if name == wanted)


def test_more_images_than_the_queue_ever_holds_are_422_not_429(narrow: Service) -> None:
    assert_invalid(narrow.post({**CHEAP, "count": CAPACITY + 1}), "body", "count")
    assert narrow.post({**CHEAP, "count": CAPACITY}).status_code == 200


def test_a_full_queue_is_429_and_admits_again_when_it_has_room(narrow: Service) -> None:
    before = narrow.metrics().of("rejected_total", reason="overloaded")
    with narrow.events(FULL) as events:
        assert first(events, "accepted")["position"] == 0
        answer = narrow.post({**CHEAP, "count": CAPACITY})
        assert_problem(answer, 429, "overloaded")
        assert int(answer.headers["retry-after"]) >= 1
        assert narrow.metrics().of("rejected_total", reason="overloaded") == before + 1
        health = narrow.client.get("/health").json()["queue"]
        assert health["waiting"] + health["running"] <= CAPACITY  # admitted whole or not at all
        assert narrow.client.get("/livez").status_code == 200
    narrow.wait_until_idle()
    assert narrow.post({**CHEAP, "count": CAPACITY}).status_code == 200


def test_a_request_that_would_end_after_its_own_deadline_is_429_at_once(narrow: Service) -> None:
    before = narrow.metrics().of("rejected_total", reason="overloaded")
    with narrow.events({"digit": 1}) as events:
        alone = first(events, "accepted")["eta_seconds"]
    narrow.wait_until_idle()
    with narrow.events(FULL) as events:
        first(events, "accepted")
        answer = narrow.post({"digit": 1, "timeout_seconds": alone / 2})
        assert_problem(answer, 429, "overloaded")
        assert int(answer.headers["retry-after"]) >= 1
    assert narrow.metrics().of("rejected_total", reason="overloaded") == before + 1


def test_a_request_with_an_early_deadline_overtakes_one_that_can_wait(narrow: Service) -> None:
    with narrow.events(FULL) as events:
        backlog = first(events, "accepted")["eta_seconds"]
        assert narrow.post({"digit": 1, "timeout_seconds": backlog / 2}).status_code == 200
        assert narrow.metrics().of("running_images") + narrow.metrics().of("queue_depth_images") > CAPACITY / 2


def test_a_deadline_that_passes_is_504_and_frees_the_rows(narrow: Service) -> None:
    """The process is stopped until the time is over, as a machine that stalls would stop it."""
    body = {"digit": 1, "count": 8}
    with narrow.events(body) as events:
        eta = first(events, "accepted")["eta_seconds"]
    narrow.wait_until_idle()
    before, left_before = narrow.metrics(), cancelled(narrow)
    body["timeout_seconds"] = 3 * eta + 1  # enough for both
    with ThreadPoolExecutor() as pool, narrow.events(body, "?previews=100") as events:
        first(events, "progress")
        late = pool.submit(narrow.post, body)
        eventually(lambda: narrow.metrics().of("queue_depth_images") >= 8, "the second request is admitted")
        narrow.process.signal(signal.SIGSTOP)
        try:
            time.sleep(body["timeout_seconds"])
        finally:
            narrow.process.signal(signal.SIGCONT)
        assert_problem(late.result(PATIENCE), 504, "deadline_exceeded")
        name, problem = list(events)[-1]
    assert (name, problem["code"], problem["status"]) == ("error", "deadline_exceeded", 504)
    narrow.wait_until_idle()
    assert 8 < cancelled(narrow) - left_before <= 16
    after = narrow.metrics()
    assert after.of("rejected_total", reason="deadline") - before.of("rejected_total", reason="deadline") == 2
    assert narrow.post(CHEAP).status_code == 200


def test_a_client_that_leaves_frees_its_rows(narrow: Service) -> None:
    before = cancelled(narrow)
    content = json.dumps({"digit": 1, "count": CAPACITY}).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Type: {JSON}\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.create_connection(narrow.address, timeout=PATIENCE) as connection:
        connection.sendall(head.encode() + content)
        narrow.wait_until_running()
    narrow.wait_until_idle()
    assert 0 < cancelled(narrow) - before <= CAPACITY


def test_a_client_that_leaves_its_stream_frees_its_rows_and_nobody_elses(narrow: Service) -> None:
    before = narrow.metrics()
    with ThreadPoolExecutor() as pool:
        with narrow.events({"digit": 1, "count": 16}) as events:
            first(events, "progress")
            other = pool.submit(narrow.post, {"digit": 2, "count": 2, "num_steps": 10})
            eventually(lambda: narrow.metrics().of("queue_depth_images") >= 2, "the other request is admitted")
        assert other.result(PATIENCE).status_code == 200
    narrow.wait_until_idle()
    after = narrow.metrics()
    assert after.of("cancelled_total", stage="running") > before.of("cancelled_total", stage="running")
    assert after.of("cancelled_total", stage="waiting") > before.of("cancelled_total", stage="waiting")
    assert after.of("images_total", digit="2") - before.of("images_total", digit="2") == 2


def test_a_newcomer_takes_part_in_the_next_step(service: Service) -> None:
    """While as many images run as there are rows."""
    service.wait_until_idle()
    with service.events({"digit": 1, "count": 64}) as events:
        first(events, "progress")
        before = service.metrics()
        assert service.post({"digit": 2}).status_code == 200
        after = service.metrics()
    waited = {
        bound: after.of("admission_wait_steps_bucket", le=bound) - before.of("admission_wait_steps_bucket", le=bound)
        for bound in ("1.0", "+Inf")
    }
    assert waited == {"1.0": 1, "+Inf": 1}  # the step that was running when it came, at most
