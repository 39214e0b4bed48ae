"""Tests the service under Ray Serve: two replicas on one Ray node, behind Ray's own proxy."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.ray.proxy import MOST_BYTES
from tests.e2e.conftest import SHARED
from tests.e2e.process import ROOT, TIMEOUT, wait_until
from tests.e2e.ray_cluster import RayCluster
from tests.e2e.service import Service, assert_problem, pngs

pytestmark = [
    pytest.mark.skipif(not find_spec("ray"), reason="needs the extra ray"),
    pytest.mark.timeout(600),
]

# Tests of the shared service that also hold through Ray's proxy, with two replicas. Not among them are the tests of
# connections, which end at the proxy, and those of metrics, which have the additional label `replica`.
CONTRACT = ("test_response_formats.py", "test_idempotency.py", "test_http.py")
MORE_OF_CONTRACT = (
    *("test_reproduce.py", "test_openai.py", "test_labels.py", "test_picture_tasks.py", "test_validation.py"),
    "test_reproducibility.py",
)
# The proxy answers an invalid Content-Length with its own 400, and a body that arrives faster than the replica refuses
# its type with its own 413. Each replica has loaded its models at another time.
DIFFERENT = "not content_length_over_the_limit and not (endless_body and plain) and not models_are_listed"
LONG = {"digit": 3, "count": 8, "num_steps": 100}


@pytest.fixture(scope="module")
def cluster(checkpoint: Path) -> Iterator[RayCluster]:
    running = RayCluster(checkpoint)
    try:
        running.deploy(2, variables=SHARED)
        running.wait_until_running(2)
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def through_ray(cluster: RayCluster) -> Iterator[Service]:
    service = Service(None, cluster.url)
    yield service
    service.client.close()


@contextmanager
def load(url: str, clients: int = 6) -> Iterator[list[tuple[int, httpx.Response]]]:
    """Sends requests from several clients until the end of the block. Yields their answers, by number of the client.

    Clients with an odd number send their number as the seed. A connection that breaks fails the test.
    """
    answers: list[tuple[int, httpx.Response]] = []
    is_over = threading.Event()

    def send(number: int) -> None:
        body = LONG | ({"seed": number} if number % 2 else {})
        with httpx.Client(base_url=url, timeout=2 * TIMEOUT) as client:
            while not is_over.is_set():
                answers.append((number, client.post("/generate", json=body)))

    with ThreadPoolExecutor(clients) as pool:
        sending = [pool.submit(send, number) for number in range(clients)]
        try:
            wait_until(lambda: len(answers) >= clients, "the first answers arrive")
            yield answers
        finally:
            is_over.set()
    for each in sending:
        each.result()


def assert_same_bytes(answers: list[tuple[int, httpx.Response]]) -> None:
    """Checks that all answers to a client with a seed are equal."""
    for number in {number for number, _ in answers if number % 2}:
        assert len({tuple(pngs(answer)) for own, answer in answers if own == number}) == 1


def run_contract(service: Service, *files: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--service={service.url}"]
    paths = [str(Path(__file__).with_name(name)) for name in files]
    return subprocess.run(
        [*command, "-k", DIFFERENT, *paths], cwd=ROOT, capture_output=True, text=True, timeout=500, check=False
    )


def test_contract_holds_through_the_proxy(through_ray: Service) -> None:
    done = run_contract(through_ray, *CONTRACT)
    assert done.returncode == 0, done.stdout[-8000:]


@pytest.mark.slow
def test_more_of_the_contract_holds_through_the_proxy(through_ray: Service) -> None:
    done = run_contract(through_ray, *MORE_OF_CONTRACT)
    assert done.returncode == 0, done.stdout[-8000:]


def test_requests_and_metrics_of_both_replicas(cluster: RayCluster, through_ray: Service) -> None:
    names = {each["replica_id"] for each in cluster.replicas()}
    before = through_ray.metrics()
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda seed: through_ray.images(digit=1, seed=7), range(16)))
    assert len({tuple(answer) for answer in answers}) == 1
    wait_until(lambda: _answered(through_ray, before) == 16, "all requests are counted")
    after = through_ray.metrics()
    assert {dict(labels)["replica"] for name, labels in after if name == "unfog_ready"} == names
    for replica in names:  # Ray sends some of the requests to each replica.
        assert after.value("requests_total", replica=replica, route="/generate", code="200") > before.value(
            "requests_total", replica=replica, route="/generate", code="200"
        )
    text = through_ray.client.get("/metrics").text
    families = [family.name for family in text_string_to_metric_families(text)]
    assert len(families) == len(set(families))
    assert text.count("# TYPE unfog_ready ") == 1


def _answered(service: Service, before: Any) -> float:
    name, labels = "requests_total", {"route": "/generate", "code": "200"}
    return float(service.metrics().value(name, **labels) - before.value(name, **labels))


def test_stream_arrives_while_its_images_run(through_ray: Service) -> None:
    with through_ray.events(LONG | {"count": 32}) as events:
        assert next(events)[0] == "accepted"
        assert next(events)[0] == "progress"
        assert through_ray.metrics().value("running_images") == 32
        assert [name for name, _ in events][-1] == "done"


@pytest.mark.parametrize("header", ["", "x-request-disconnect-disabled: ?1\r\n"], ids=["plain", "disabled"])
@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_client_that_leaves_frees_its_rows(through_ray: Service, accept: str, header: str) -> None:
    through_ray.wait_until_idle()
    before = through_ray.metrics()
    body = json.dumps(LONG | {"count": 64}).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: test\r\nAccept: {accept}\r\n{header}Content-Length: {len(body)}\r\n"
    with socket.create_connection(through_ray.address, timeout=TIMEOUT) as connection:
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        through_ray.wait_until_running()
    through_ray.wait_until_idle()
    assert through_ray.metrics().value("cancelled_total") - before.value("cancelled_total") == 64


def test_time_limit_of_the_proxy_cannot_be_set_by_a_client(through_ray: Service) -> None:
    response = through_ray.post(LONG, **{"x-request-timeout-seconds": "0.01"})
    assert response.status_code == 200


def test_request_id_is_sent_once(through_ray: Service) -> None:
    response = through_ray.post({"digit": 1}, **{"x-request-id": "mine"})
    assert response.headers.get_list("x-request-id") == ["mine"]
    response = through_ray.post({"digit": 1}, **{"x-request-id": "not valid"})
    (own,) = response.headers.get_list("x-request-id")
    assert own != "not valid"


def test_endless_body_does_not_fill_the_memory_of_the_proxy(cluster: RayCluster, through_ray: Service) -> None:
    proxy = cluster.process_named("ray::ProxyActor")
    before = proxy.memory_info().rss
    head = b"POST /generate HTTP/1.1\r\nHost: test\r\nContent-Length: 999999999999\r\nContent-Type: text/plain\r\n\r\n"
    response = b""
    with socket.create_connection(through_ray.address, timeout=TIMEOUT) as connection, pytest.raises(ConnectionError):
        connection.sendall(head)
        while True:  # until the proxy closes the connection
            connection.sendall(b" " * 2**16)
            if select.select([connection], [], [], 0)[0]:
                response += connection.recv(2**16)
    assert response.startswith((b"HTTP/1.1 413 ", b"HTTP/1.1 415 "))  # depends on which of the two answers first
    assert proxy.memory_info().rss - before < 2 * MOST_BYTES


def test_killed_replica_fails_only_its_requests_without_a_seed(cluster: RayCluster, through_ray: Service) -> None:
    victim = cluster.replicas()[0]
    with load(cluster.url) as answers:
        os.kill(victim["pid"], signal.SIGKILL)
        cluster.wait_until_running(2, without=frozenset([victim["replica_id"]]))
    failed = [(number, answer) for number, answer in answers if answer.status_code != 200]
    for number, answer in failed:
        assert number % 2 == 0, "a request with a seed failed"
        assert_problem(answer, 502, "replica_lost")
    # Each client has one request at a time, so at most the three clients without a seed lose one.
    assert len(failed) <= 3
    assert_same_bytes(answers)


@pytest.mark.slow  # it starts two replicas again
def test_stream_of_a_killed_replica_ends_with_an_error(cluster: RayCluster, through_ray: Service) -> None:
    with through_ray.events(LONG | {"count": 64, "seed": 1}) as events:
        assert next(events)[0] == "accepted"
        assert next(events)[0] == "progress"
        old = frozenset(each["replica_id"] for each in cluster.replicas())
        for each in cluster.replicas():
            os.kill(each["pid"], signal.SIGKILL)
        *_, (name, problem) = events
    assert (name, problem["code"]) == ("error", "replica_lost")
    # A request with a seed waits for the new replica.
    assert through_ray.images(digit=1, seed=7)
    cluster.wait_until_running(2, without=old)


@pytest.mark.slow  # it starts two replicas again
def test_rolling_redeploy_under_load_loses_no_request(cluster: RayCluster) -> None:
    old = frozenset(each["replica_id"] for each in cluster.replicas())
    with load(cluster.url) as answers:
        cluster.deploy(2, variables=SHARED | {"UNFOG_LOG_LEVEL": "warning"})
        cluster.wait_until_running(2, without=old)
    assert Counter(answer.status_code for _, answer in answers) == {200: len(answers)}
    assert_same_bytes(answers)


@pytest.mark.slow  # it starts a replica again
def test_full_replica_and_full_proxy_are_429(cluster: RayCluster, through_ray: Service) -> None:
    old = frozenset(each["replica_id"] for each in cluster.replicas())
    limits = {"max_ongoing_requests": 3, "max_queued_requests": 2}
    cluster.deploy(1, variables=SHARED | {"UNFOG_QUEUE_CAPACITY": "64", "UNFOG_MAX_BATCH": "1"}, **limits)
    cluster.wait_until_running(1, without=old)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(through_ray.post, LONG | {"count": 64})
        through_ray.wait_until_running()
        refused = through_ray.post(LONG | {"count": 64})
        assert_problem(refused, 429, "overloaded")
        assert refused.json()["detail"].startswith("The queue has no room for this request")
        assert first.result().status_code == 200
        with ExitStack() as viewers:  # They are requests that do not end.
            streams = [viewers.enter_context(through_ray.client.stream("GET", "/events/batch")) for _ in range(3)]
            lines = [stream.iter_lines() for stream in streams]  # An iterator that is deleted closes its connection.
            assert [next(each) for each in lines] == 3 * ["event: batch"]
            others = [pool.submit(through_ray.post, {"digit": 1}) for _ in range(3)]
            refused = next(as_completed(others)).result()
        assert_problem(refused, 429, "overloaded")
        assert refused.json()["detail"].startswith("All replicas are busy")
        assert sorted(each.result().status_code for each in others) == [200, 200, 429]


@pytest.mark.slow
def test_replicas_follow_the_number_of_images_without_an_error(cluster: RayCluster) -> None:
    scaling = {
        "min_replicas": 1,
        "max_replicas": 2,
        "upscale_delay_s": 1,
        "downscale_delay_s": 3,
        "metrics_interval_s": 0.5,  # Ray's default of 10 s would make the test longer
        "look_back_period_s": 2,
        "policy": {"policy_function": "app.ray.autoscaling:ImagesPerReplica", "policy_kwargs": {"images": 16}},
    }
    old = frozenset(each["replica_id"] for each in cluster.replicas())
    cluster.deploy("auto", variables=SHARED, autoscaling_config=scaling)
    cluster.wait_until_running(1, without=old)
    with load(cluster.url) as answers:
        cluster.wait_until_running(2)
    with load(cluster.url, clients=1) as few:
        cluster.wait_until_running(1)
    assert Counter(answer.status_code for _, answer in answers + few) == {200: len(answers + few)}
