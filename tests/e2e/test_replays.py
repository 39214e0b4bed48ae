"""What brought other servers to a halt, done to this one. Each test is named for the report that it replays."""

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.conftest import start_service
from tests.e2e.crowd import rush, vanish
from tests.e2e.faulty import seed_of
from tests.e2e.loading import Loading
from tests.e2e.process import PATIENCE, eventually
from tests.e2e.service import Service, assert_problem, pngs

GOOD = {"digit": 5, "count": 4, "seed": 50}
ABORTS = 300


@pytest.fixture(scope="module")
def faulty(checkpoint: Path) -> Iterator[Service]:
    """A service whose rows can be told to fail."""
    with ExitStack() as stack:
        yield start_service(stack, checkpoint, "tests.e2e.faulty", UNFOG_MAX_BATCH="8", UNFOG_REQUEST_TIMEOUT="300")


def test_ray_50046_cancelled_requests_do_not_wedge_the_batch_that_they_were_in(faulty: Service) -> None:
    """All rows of the step in progress are cancelled at once; the next batch is made all the same."""
    wanted = faulty.images(**GOOD)
    for _ in range(5):
        with ExitStack() as stack:
            streams = [stack.enter_context(faulty.events({"digit": 1, "count": 2})) for _ in range(4)]
            for events in streams:
                assert next(events)[0] == "accepted"
            faulty.wait_until_running()
        assert faulty.images(**GOOD) == wanted
    faulty.wait_until_idle()


def test_ray_66140_one_bad_item_does_not_wedge_those_behind_it(faulty: Service) -> None:
    """A bad row first in the queue, with more waiting than a step holds."""
    wanted = faulty.images(**GOOD)
    with ThreadPoolExecutor() as pool:
        bad = [pool.submit(faulty.post, {"digit": 9, "seed": seed_of("exception", step)}) for step in (0, 1, 99)]
        good = [pool.submit(faulty.post, GOOD) for _ in range(6)]
        for answer in bad:
            assert_problem(answer.result(PATIENCE), 500, "internal_error")
        assert all(pngs(answer.result(PATIENCE)) == wanted for answer in good)
    faulty.wait_until_idle()


def test_vllm_omni_3167_aborts_poison_no_later_request(service: Service) -> None:
    """It took eight hours there; here every abort is looked at."""
    wanted = service.images(**GOOD)
    for seed in range(ABORTS // 50):
        vanish(service, {"digit": 2, "count": 3, "num_steps": 30}, count=50, seed=100 + seed)
        assert service.images(**GOOD) == wanted
    service.wait_until_idle()


def test_litserve_165_and_others_work_stops_when_its_client_leaves(faulty: Service) -> None:
    """The loudest wish about other servers: what nobody waits for is not drawn to its end."""
    before = faulty.metrics()
    with faulty.events({"digit": 1, "count": 64}) as events:
        assert next(events)[0] == "accepted"
        eventually(lambda: faulty.metrics().of("batch_rows_sum") > before.of("batch_rows_sum"), "a step is made")
    faulty.wait_until_idle()
    after = faulty.metrics()
    steps = after.of("batch_rows_sum") - before.of("batch_rows_sum")
    assert 0 < steps < 64 * 100 / 2


def test_mlserver_2056_and_kserve_2775_nothing_is_ready_before_a_model_is(checkpoint: Path, tmp_path: Path) -> None:

    loading = Loading(checkpoint, tmp_path)
    try:
        for probe in ("/readyz", "/startupz", "/health"):
            assert loading.client.get(probe).status_code == 503
        assert_problem(loading.client.post("/generate", json=GOOD), 503, "starting")
    finally:
        loading.end()


def test_tei_662_images_are_counted_not_requests(checkpoint: Path) -> None:
    """One request of many images fills what as many requests of one do."""
    with ExitStack() as stack:
        service = start_service(
            stack, checkpoint, UNFOG_MAX_BATCH="1", UNFOG_QUEUE_CAPACITY="16", UNFOG_REQUEST_TIMEOUT="600"
        )
        with service.events({"digit": 1, "count": 16}) as events:
            assert next(events)[0] == "accepted"
            assert_problem(service.post({"digit": 2, "count": 16, "num_steps": 1}), 429, "overloaded")
        service.wait_until_idle()
        crowd = rush(service, [{"digit": 1, "num_steps": 20}] * 40)
        assert crowd.count(200) >= 16
        assert crowd.count(200) + crowd.count(429) == 40


def test_vllm_24885_admitted_work_is_finished_after_sigterm(checkpoint: Path) -> None:
    with ExitStack() as stack:
        service = start_service(
            stack, checkpoint, UNFOG_MAX_BATCH="4", UNFOG_REQUEST_TIMEOUT="300", UNFOG_DRAIN_TIMEOUT="300"
        )
        pool = stack.enter_context(ThreadPoolExecutor())
        admitted = [pool.submit(service.post, GOOD) for _ in range(4)]
        eventually(lambda: service.client.get("/health").json()["queue"]["running"] >= 4, "they run")
        service.process.signal(signal.SIGTERM)
        assert {answer.result(PATIENCE).status_code for answer in admitted} == {200}
        assert service.process.wait() == 0
