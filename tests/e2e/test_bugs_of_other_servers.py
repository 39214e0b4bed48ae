"""Replays bugs that were reported for other inference servers. Each test is named after the report."""

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.concurrent_clients import send_all, send_and_disconnect
from tests.e2e.conftest import start_service
from tests.e2e.faulty_service import fault_seed
from tests.e2e.loading_process import LoadingProcess
from tests.e2e.process import TIMEOUT, wait_until
from tests.e2e.service import Service, assert_problem, pngs

BODY = {"digit": 5, "count": 4, "seed": 50}
ABORTS = 300


@pytest.fixture(scope="module")
def faulty(checkpoint: Path) -> Iterator[Service]:
    """A service with fault injection."""
    with ExitStack() as stack:
        yield start_service(
            stack, checkpoint, "tests.e2e.faulty_service", UNFOG_MAX_BATCH="8", UNFOG_REQUEST_TIMEOUT="300"
        )


def test_ray_50046_cancelling_a_whole_batch_does_not_block_the_next_one(faulty: Service) -> None:
    """Cancels all rows of the running step at the same time."""
    expected = faulty.images(**BODY)
    for _ in range(5):
        with ExitStack() as stack:
            streams = [stack.enter_context(faulty.events({"digit": 1, "count": 2})) for _ in range(4)]
            for events in streams:
                assert next(events)[0] == "accepted"
            faulty.wait_until_running()
        assert faulty.images(**BODY) == expected
    faulty.wait_until_idle()


def test_ray_66140_failing_row_does_not_block_the_rows_behind_it(faulty: Service) -> None:
    """The failing rows are first in the queue, and more rows wait than fit into one step."""
    expected = faulty.images(**BODY)
    with ThreadPoolExecutor() as pool:
        failing = [pool.submit(faulty.post, {"digit": 9, "seed": fault_seed("exception", step)}) for step in (0, 1, 99)]
        valid = [pool.submit(faulty.post, BODY) for _ in range(6)]
        for response in failing:
            assert_problem(response.result(TIMEOUT), 500, "internal_error")
        assert all(pngs(response.result(TIMEOUT)) == expected for response in valid)
    faulty.wait_until_idle()


def test_vllm_omni_3167_aborts_do_not_affect_later_requests(service: Service) -> None:
    """The report needed eight hours of aborts. This test checks the images after every 50 aborts."""
    expected = service.images(**BODY)
    for seed in range(ABORTS // 50):
        send_and_disconnect(service, {"digit": 2, "count": 3, "num_steps": 30}, count=50, seed=100 + seed)
        assert service.images(**BODY) == expected
    service.wait_until_idle()


def test_litserve_165_work_stops_when_its_client_disconnects(faulty: Service) -> None:
    """A cancelled request must not run all of its steps."""
    before = faulty.metrics()
    with faulty.events({"digit": 1, "count": 64}) as events:
        assert next(events)[0] == "accepted"
        wait_until(
            lambda: faulty.metrics().value("batch_rows_sum") > before.value("batch_rows_sum"), "the first step has run"
        )
    faulty.wait_until_idle()
    after = faulty.metrics()
    rows = after.value("batch_rows_sum") - before.value("batch_rows_sum")
    assert 0 < rows < 64 * 100 / 2


def test_mlserver_2056_and_kserve_2775_not_ready_before_the_model(checkpoint: Path, tmp_path: Path) -> None:
    loading = LoadingProcess(checkpoint, tmp_path)
    try:
        for probe in ("/readyz", "/startupz", "/health"):
            assert loading.client.get(probe).status_code == 503
        assert_problem(loading.client.post("/generate", json=BODY), 503, "starting")
    finally:
        loading.close()


def test_tei_662_queue_capacity_counts_images(checkpoint: Path) -> None:
    """One request of 16 images uses as much capacity as 16 requests of one image."""
    with ExitStack() as stack:
        service = start_service(
            stack, checkpoint, UNFOG_MAX_BATCH="1", UNFOG_QUEUE_CAPACITY="16", UNFOG_REQUEST_TIMEOUT="600"
        )
        with service.events({"digit": 1, "count": 16}) as events:
            assert next(events)[0] == "accepted"
            assert_problem(service.post({"digit": 2, "count": 16, "num_steps": 1}), 429, "overloaded")
        service.wait_until_idle()
        results = send_all(service, [{"digit": 1, "num_steps": 20}] * 40)
        assert results.count(200) >= 16
        assert results.count(200) + results.count(429) == 40


def test_vllm_24885_admitted_requests_complete_after_sigterm(checkpoint: Path) -> None:
    with ExitStack() as stack:
        service = start_service(
            stack, checkpoint, UNFOG_MAX_BATCH="4", UNFOG_REQUEST_TIMEOUT="300", UNFOG_DRAIN_TIMEOUT="300"
        )
        pool = stack.enter_context(ThreadPoolExecutor())
        admitted = [pool.submit(service.post, BODY) for _ in range(4)]

        def num_admitted() -> int:
            queue = service.client.get("/health").json()["queue"]
            return int(queue["waiting"] + queue["running"])

        wait_until(lambda: num_admitted() == 4 * BODY["count"], "all four requests are admitted")
        service.process.signal(signal.SIGTERM)
        assert {response.result(TIMEOUT).status_code for response in admitted} == {200}
        assert service.process.wait() == 0
