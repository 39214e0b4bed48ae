"""Failures at any step: who loses what, who notices, and what comes after."""

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import start_service
from tests.e2e.faulty import seed_of
from tests.e2e.process import PATIENCE, eventually
from tests.e2e.service import Service, assert_problem, pngs

FAULTY = "tests.e2e.faulty"
NEIGHBOURS: list[dict[str, Any]] = [{"digit": digit, "count": 8, "seed": digit} for digit in range(4)]
STEPS = (0, 1, 50, 99)  # of a hundred
SOON = {"UNFOG_WATCHDOG_SECONDS": "0.5", "UNFOG_GIVE_UP_SECONDS": "1"}


@pytest.fixture(scope="module")
def faulty(checkpoint: Path) -> Iterator[Service]:
    """One for the failures that a service lives through."""
    with ExitStack() as stack:
        yield start_service(stack, checkpoint, FAULTY, UNFOG_MAX_BATCH="64", UNFOG_REQUEST_TIMEOUT="300")


@pytest.fixture(scope="module")
def neighbours_images(service: Service) -> list[list[bytes]]:
    """What another service, without a failure near, draws for them."""
    return [service.images(**body) for body in NEIGHBOURS]


def in_company(service: Service, body: dict[str, Any]) -> tuple[httpx.Response, list[httpx.Response]]:
    """The answer to a request, and to its neighbours, with which it shared steps."""
    before = service.metrics()
    with ThreadPoolExecutor() as pool:
        others = [pool.submit(service.post, neighbour) for neighbour in NEIGHBOURS]
        eventually(lambda: service.metrics().of("running_images") >= 4, "the neighbours run")
        answer = service.post(body)
        answers = [other.result(PATIENCE) for other in others]
    assert service.mean_rows_since(before) > 3
    return answer, answers


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", ["exception", "nan"])
def test_a_row_that_fails_costs_its_own_request_and_nobody_elses_bytes(
    faulty: Service, neighbours_images: list[list[bytes]], kind: str, step: int
) -> None:
    if kind == "nan" and step == 0:
        step = 2  # before its first step a row has no state that could be spoiled
    answer, others = in_company(faulty, {"digit": 9, "count": 3, "seed": seed_of(kind, step)})
    assert_problem(answer, 500, "internal_error")
    assert [pngs(other) for other in others] == neighbours_images
    faulty.wait_until_idle()
    assert faulty.client.get("/livez").status_code == 200


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_does_not_fit_into_memory_costs_nobody_anything(
    faulty: Service, neighbours_images: list[list[bytes]], step: int
) -> None:
    answer, others = in_company(faulty, {"digit": 9, "count": 3, "seed": seed_of("memory", step)})
    assert answer.status_code == 200
    assert len(pngs(answer)) == 3
    assert [pngs(other) for other in others] == neighbours_images
    faulty.wait_until_idle()


def test_a_stream_that_fails_ends_with_an_error_event(faulty: Service) -> None:
    with faulty.events({"digit": 9, "seed": seed_of("exception", 30)}) as events:
        name, problem = list(events)[-1]
    assert (name, problem["code"], problem["status"]) == ("error", "internal_error", 500)
    (line,) = [line for line in faulty.process.lines if problem["request_id"] in line and "exception" in line]
    assert "ZeroDivisionError" in line  # the log knows what the client is not told


@pytest.mark.parametrize("step", [99])
def test_a_lost_device_answers_everyone_and_ends_the_process_for_another(
    checkpoint: Path, neighbours_images: list[list[bytes]], step: int
) -> None:
    with ExitStack() as stack:
        lost = start_service(stack, checkpoint, FAULTY, UNFOG_REQUEST_TIMEOUT="300", **SOON)
        answer, others = in_company(lost, {"digit": 9, "seed": seed_of("lost", step)})
        assert_problem(answer, 503, "engine_failed")
        for other, images in zip(others, neighbours_images, strict=True):
            if other.status_code == 200:  # it was done before
                assert pngs(other) == images
            else:
                assert_problem(other, 503, "engine_failed")
        health = lost.client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        assert [lost.client.get(probe).status_code for probe in ("/livez", "/readyz")] == [503, 503]
        assert_problem(lost.post({"digit": 1}), 503, "engine_failed")
        assert lost.process.wait() == 1
        assert "Traceback" not in lost.process.lines[-1]
        assert "Engine unresponsive for 1 s" in lost.process.lines[-1]
        again = start_service(stack, checkpoint, FAULTY)
        assert again.images(**NEIGHBOURS[0]) == neighbours_images[0]


def test_a_stuck_device_is_noticed_its_waiters_are_answered_and_the_process_ends(checkpoint: Path) -> None:
    with ExitStack() as stack:
        stuck = start_service(stack, checkpoint, FAULTY, UNFOG_REQUEST_TIMEOUT="300", **SOON)
        pool = stack.enter_context(ThreadPoolExecutor())
        waiting = [pool.submit(stuck.post, {"digit": 2, "count": 64}) for _ in range(3)]
        stuck.wait_until_running()
        waiting.append(pool.submit(stuck.post, {"digit": 9, "seed": seed_of("stuck", 0)}))
        eventually(lambda: stuck.client.get("/livez").status_code == 503, "the watchdog has noticed")
        assert stuck.client.get("/health").json()["status"] == "failed"
        assert_problem(stuck.post({"digit": 1}), 503, "engine_failed")  # nobody else is let in to wait
        for each in waiting:
            assert_problem(each.result(PATIENCE), 503, "engine_failed")
        assert stuck.process.wait() == 1


def test_an_orchestrator_that_asks_livez_and_restarts_has_a_service_again(
    checkpoint: Path, neighbours_images: list[list[bytes]]
) -> None:
    """Also where the process may not end itself."""
    settings = {"UNFOG_WATCHDOG_SECONDS": "0.5", "UNFOG_GIVE_UP_SECONDS": "never"}
    with ExitStack() as stack:
        stuck = start_service(stack, checkpoint, FAULTY, **settings)
        pool = stack.enter_context(ThreadPoolExecutor())
        waiting = pool.submit(stuck.post, {"digit": 9, "seed": seed_of("stuck", 0), "timeout_seconds": 1})
        eventually(lambda: stuck.client.get("/livez").status_code == 503, "the watchdog has noticed")
        assert_problem(waiting.result(PATIENCE), 504, "deadline_exceeded")
        stuck.process.signal(signal.SIGKILL)
        assert stuck.process.wait() == -signal.SIGKILL
        again = start_service(stack, checkpoint, FAULTY, **settings)
        assert again.images(**NEIGHBOURS[0]) == neighbours_images[0]


def test_sigterm_ends_a_stuck_process_with_status_0_when_its_time_is_over(checkpoint: Path) -> None:
    """Also where the watchdog gives it up meanwhile: it was asked to end."""
    with ExitStack() as stack:
        stuck = start_service(stack, checkpoint, FAULTY, UNFOG_REQUEST_TIMEOUT="300", UNFOG_DRAIN_TIMEOUT="3", **SOON)
        pool = stack.enter_context(ThreadPoolExecutor())
        waiting = pool.submit(stuck.post, {"digit": 9, "seed": seed_of("stuck", 10)})
        stuck.wait_until_running()
        stuck.process.signal(signal.SIGTERM)
        assert_problem(waiting.result(PATIENCE), 503, "draining")
        assert stuck.process.wait() == 0


def test_steps_that_always_fail_turn_readyz_to_503_and_end_the_process(checkpoint: Path) -> None:
    with ExitStack() as stack:
        broken = start_service(stack, checkpoint, FAULTY, **SOON)
        assert_problem(broken.post({"digit": 9, "seed": seed_of("broken", 0)}), 500, "internal_error")
        assert broken.client.get("/readyz").status_code == 200  # one failed batch says nothing yet
        for _ in range(2):
            assert_problem(broken.post({"digit": 1}), 500, "internal_error")
        eventually(lambda: broken.client.get("/readyz").status_code == 503, "the probe image could not be generated")
        assert broken.client.get("/health").json()["status"] == "failed"
        assert_problem(broken.post({"digit": 1}), 503, "engine_failed")
        assert broken.process.wait() == 1


def test_poisoned_requests_do_not_turn_readyz_to_503(faulty: Service) -> None:
    faulty.wait_until_idle()
    wanted = faulty.images(digit=3, seed=1)
    for _ in range(7):
        assert_problem(faulty.post({"digit": 9, "seed": seed_of("exception", 0)}), 500, "internal_error")
    assert faulty.client.get("/readyz").status_code == 200
    assert any("testing the engine with the probe image" in line for line in faulty.process.lines)
    assert faulty.images(digit=3, seed=1) == wanted
