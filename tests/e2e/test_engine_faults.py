"""Faults injected at any step: which requests fail, how the probes react, and how the service recovers."""

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import start_service
from tests.e2e.faulty_service import fault_seed
from tests.e2e.process import TIMEOUT, wait_until
from tests.e2e.service import Service, assert_problem, pngs

FAULTY = "tests.e2e.faulty_service"
NEIGHBOURS: list[dict[str, Any]] = [{"digit": digit, "count": 4, "seed": digit, "num_steps": 40} for digit in range(4)]
FAULTY_REQUEST = {"digit": 9, "count": 3, "num_steps": 20}
STEPS = (0, 1, 10, 19)  # steps at which a fault is injected, of 20
SOON = {"UNFOG_WATCHDOG_SECONDS": "0.5", "UNFOG_GIVE_UP_SECONDS": "1"}


@pytest.fixture(scope="module")
def faulty(checkpoint: Path) -> Iterator[Service]:
    """Shared service with fault injection for faults that it survives."""
    with ExitStack() as stack:
        yield start_service(stack, checkpoint, FAULTY, UNFOG_MAX_BATCH="64", UNFOG_REQUEST_TIMEOUT="300")


@pytest.fixture(scope="module")
def neighbours_images(service: Service) -> list[list[bytes]]:
    """Returns the images of NEIGHBOURS from a service without faults."""
    return [service.images(**body) for body in NEIGHBOURS]


def post_with_neighbours(service: Service, body: dict[str, Any]) -> tuple[httpx.Response, list[httpx.Response]]:
    """Sends a request that shares its steps with NEIGHBOURS. Returns its response and theirs."""
    before = service.metrics()
    with ThreadPoolExecutor() as pool:
        others = [pool.submit(service.post, neighbour) for neighbour in NEIGHBOURS]
        wait_until(lambda: service.metrics().value("running_images") >= 4, "rows of the neighbours run")
        response = service.post(body)
        responses = [other.result(TIMEOUT) for other in others]
    assert service.mean_rows_since(before) > 3
    return response, responses


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", ["exception", "nan"])
def test_failing_row_fails_only_its_own_request(
    faulty: Service, neighbours_images: list[list[bytes]], kind: str, step: int
) -> None:
    if kind == "nan" and step == 0:
        step = 2  # a row has no state to overwrite with NaN before its first step
    response, others = post_with_neighbours(faulty, {**FAULTY_REQUEST, "seed": fault_seed(kind, step)})
    assert_problem(response, 500, "internal_error")
    assert [pngs(other) for other in others] == neighbours_images
    faulty.wait_until_idle()
    assert faulty.client.get("/livez").status_code == 200


@pytest.mark.parametrize("step", STEPS)
def test_out_of_memory_step_fails_no_request(faulty: Service, neighbours_images: list[list[bytes]], step: int) -> None:
    response, others = post_with_neighbours(faulty, {**FAULTY_REQUEST, "seed": fault_seed("memory", step)})
    assert response.status_code == 200
    assert len(pngs(response)) == 3
    assert [pngs(other) for other in others] == neighbours_images
    faulty.wait_until_idle()


def test_failing_stream_ends_with_an_error_event(faulty: Service) -> None:
    with faulty.events({"digit": 9, "seed": fault_seed("exception", 30)}) as events:
        name, problem = list(events)[-1]
    assert (name, problem["code"], problem["status"]) == ("error", "internal_error", 500)

    def logged() -> list[str]:
        return [line for line in faulty.process.lines if problem["request_id"] in line and "exception" in line]

    wait_until(logged, "the failure is logged")
    (line,) = logged()
    assert "ZeroDivisionError" in line  # the log contains the exception, the response does not


def test_lost_device_is_503_for_all_requests_and_the_process_exits(
    checkpoint: Path, neighbours_images: list[list[bytes]]
) -> None:
    with ExitStack() as stack:
        lost = start_service(stack, checkpoint, FAULTY, UNFOG_REQUEST_TIMEOUT="300", **SOON)
        response, others = post_with_neighbours(lost, {**FAULTY_REQUEST, "seed": fault_seed("lost", STEPS[-1])})
        assert_problem(response, 503, "engine_failed")
        for other, images in zip(others, neighbours_images, strict=True):
            if other.status_code == 200:  # it completed before the fault
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


def test_stuck_step_is_503_for_all_requests_and_the_process_exits(checkpoint: Path) -> None:
    with ExitStack() as stack:
        stuck = start_service(stack, checkpoint, FAULTY, UNFOG_REQUEST_TIMEOUT="300", **SOON)
        pool = stack.enter_context(ThreadPoolExecutor())
        waiting = [pool.submit(stuck.post, {"digit": 2, "count": 64}) for _ in range(3)]
        stuck.wait_until_running()
        waiting.append(pool.submit(stuck.post, {"digit": 9, "seed": fault_seed("stuck", 0)}))
        wait_until(lambda: stuck.client.get("/livez").status_code == 503, "the watchdog fails /livez")
        assert stuck.client.get("/health").json()["status"] == "failed"
        assert_problem(stuck.post({"digit": 1}), 503, "engine_failed")  # new requests are rejected
        for each in waiting:
            assert_problem(each.result(TIMEOUT), 503, "engine_failed")
        assert stuck.process.wait() == 1


def test_restart_after_failed_livez_recovers_the_service(
    checkpoint: Path, neighbours_images: list[list[bytes]]
) -> None:
    """An orchestrator can recover the service if UNFOG_GIVE_UP_SECONDS=never disables the exit of the process."""
    settings = {"UNFOG_WATCHDOG_SECONDS": "0.5", "UNFOG_GIVE_UP_SECONDS": "never"}
    with ExitStack() as stack:
        stuck = start_service(stack, checkpoint, FAULTY, **settings)
        pool = stack.enter_context(ThreadPoolExecutor())
        waiting = pool.submit(stuck.post, {"digit": 9, "seed": fault_seed("stuck", 0), "timeout_seconds": 1})
        wait_until(lambda: stuck.client.get("/livez").status_code == 503, "the watchdog fails /livez")
        assert_problem(waiting.result(TIMEOUT), 504, "deadline_exceeded")
        stuck.process.signal(signal.SIGKILL)
        assert stuck.process.wait() == -signal.SIGKILL
        again = start_service(stack, checkpoint, FAULTY, **settings)
        assert again.images(**NEIGHBOURS[0]) == neighbours_images[0]


def test_sigterm_ends_a_stuck_process_with_status_0_after_the_drain_timeout(checkpoint: Path) -> None:
    """The exit status is 0 although the watchdog would also end the process during the drain."""
    with ExitStack() as stack:
        stuck = start_service(stack, checkpoint, FAULTY, UNFOG_REQUEST_TIMEOUT="300", UNFOG_DRAIN_TIMEOUT="2", **SOON)
        pool = stack.enter_context(ThreadPoolExecutor())
        waiting = pool.submit(stuck.post, {"digit": 9, "seed": fault_seed("stuck", 10)})
        stuck.wait_until_running()
        stuck.process.signal(signal.SIGTERM)
        assert_problem(waiting.result(TIMEOUT), 503, "draining")
        assert stuck.process.wait() == 0


def test_permanent_step_failure_turns_readyz_to_503_and_ends_the_process(checkpoint: Path) -> None:
    with ExitStack() as stack:
        broken = start_service(stack, checkpoint, FAULTY, **SOON)
        assert_problem(broken.post({"digit": 9, "seed": fault_seed("broken", 0)}), 500, "internal_error")
        assert broken.client.get("/readyz").status_code == 200  # a single failed batch does not change /readyz
        for _ in range(2):
            assert_problem(broken.post({"digit": 1}), 500, "internal_error")
        wait_until(lambda: broken.client.get("/readyz").status_code == 503, "the probe image could not be generated")
        assert broken.client.get("/health").json()["status"] == "failed"
        assert_problem(broken.post({"digit": 1}), 503, "engine_failed")
        assert broken.process.wait() == 1


def test_requests_that_always_fail_do_not_turn_readyz_to_503(faulty: Service) -> None:
    faulty.wait_until_idle()
    expected = faulty.images(digit=3, seed=1)
    for _ in range(7):
        assert_problem(faulty.post({"digit": 9, "seed": fault_seed("exception", 0)}), 500, "internal_error")
    assert faulty.client.get("/readyz").status_code == 200
    assert any("testing the engine with the probe image" in line for line in faulty.process.lines)
    assert faulty.images(digit=3, seed=1) == expected
