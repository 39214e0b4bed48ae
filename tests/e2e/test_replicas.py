"""Two replicas behind HAProxy with deploy/haproxy/haproxy.cfg: distribution, repetition, and loss of a replica."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from app.api.http.idempotency import seed_of
from tests.deploy.promql import HAPROXY
from tests.e2e.conftest import SHARED, start_service
from tests.e2e.haproxy import HAProxy
from tests.e2e.process import ROOT, TIMEOUT, wait_until
from tests.e2e.service import EVENTS, JSON, Service, assert_problem, pngs

CHEAP = {"digit": 7, "num_steps": 1}
LONG = {"digit": 3, "count": 4, "num_steps": 100}
LARGE = LONG | {"count": 64}
TRUSTING = SHARED | {"UNFOG_TRUSTED_PROXIES": "127.0.0.1", "UNFOG_DRAIN_TIMEOUT": "60"}
# Tests of the shared service that hold through HAProxy. The excluded ones are about connections, which end at HAProxy.
CONTRACT = (
    "test_response_formats.py",
    "test_http.py",
    "test_openai.py::test_generated_images_equal_those_of_generate",
    "test_openai.py::test_stream_of_an_edit_has_typed_events",
)
OF_CONNECTIONS = "not endless_body and not content_length_over"


class Replicas(NamedTuple):
    """The replicas, HAProxy, and a client that sends its requests to HAProxy."""

    each: tuple[Service, ...]
    haproxy: HAProxy
    service: Service

    def value(self, name: str, /, **labels: str) -> float:
        """Returns the sum of a metric of the service over all replicas."""
        return sum(replica.metrics().value(name, **labels) for replica in self.each)


Start = Callable[..., Replicas]


@pytest.fixture(scope="module")
def start_all(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Returns a function that starts replicas with these environment variables, one for each argument."""
    program = shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    if program is None:
        pytest.skip("needs HAProxy (Debian package haproxy)")
    with ExitStack() as stack:

        def start(*variables: dict[str, str]) -> Replicas:
            replicas = tuple(start_service(stack, checkpoint, **TRUSTING | each) for each in variables)
            haproxy = HAProxy(program, tmp_path_factory.mktemp("haproxy"), [each.address for each in replicas])
            stack.callback(haproxy.stop)
            service = Service(None, haproxy.url)
            stack.callback(service.client.close)
            return Replicas(replicas, haproxy, service)

        yield start


@pytest.fixture(scope="module")
def shared(start_all: Start) -> Replicas:
    """Two replicas for tests that leave them running and idle."""
    return start_all({}, {})


def test_contract_holds_through_haproxy(shared: Replicas) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--service={shared.service.url}"]
    paths = [str(Path(__file__).with_name(name)) for name in CONTRACT]
    done = subprocess.run(
        [*command, "-k", OF_CONNECTIONS, *paths], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:]


def test_requests_are_distributed_to_both_replicas(shared: Replicas) -> None:
    before = [replica.metrics() for replica in shared.each]
    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda _: shared.service.post(LONG).status_code, range(8)))
    assert statuses == [200] * 8
    labels = {"route": "/generate", "code": "200"}
    for replica, old in zip(shared.each, before, strict=True):
        assert replica.metrics().value("requests_total", **labels) - old.value("requests_total", **labels) == 4


def test_stream_arrives_event_by_event(shared: Replicas) -> None:
    with shared.service.events(LARGE, query="?previews=100") as events:
        assert next(events)[0] == "accepted"
        assert next(events)[0] == "progress"
        assert shared.value("running_images") == 64  # the first event has arrived long before the last step


@pytest.mark.parametrize("body", [{}, {"seed": 5}], ids=["without seed", "with seed"])
@pytest.mark.parametrize("accept", [JSON, EVENTS])
def test_client_that_leaves_frees_its_rows(shared: Replicas, accept: str, body: dict[str, int]) -> None:
    wait_until(lambda: not shared.value("running_images"), "no image runs")
    before = shared.value("cancelled_total")
    content = json.dumps(LARGE | body)
    head = f"POST /generate HTTP/1.1\r\nhost: x\r\naccept: {accept}\r\ncontent-type: {JSON}\r\n"
    with socket.create_connection(shared.service.address, TIMEOUT) as connection:
        connection.sendall(f"{head}content-length: {len(content)}\r\n\r\n{content}".encode())
        wait_until(lambda: shared.value("running_images"), "the images run")
    wait_until(lambda: not shared.value("running_images"), "no image runs")
    assert shared.value("cancelled_total") - before == 64


def test_client_address_and_request_id_reach_the_replica(shared: Replicas) -> None:
    transport = httpx.HTTPTransport(local_address="127.0.0.9")
    forged = {"x-forwarded-for": "192.0.2.1", "x-request-id": "through-haproxy"}
    with httpx.Client(base_url=shared.service.url, transport=transport, timeout=TIMEOUT) as client:
        response = client.post("/generate", json=CHEAP, headers=forged)
    assert response.headers.get_list("x-request-id") == ["through-haproxy"]

    def line() -> str:
        return "".join(line for each in shared.each for line in each.process.lines if "through-haproxy" in line)

    wait_until(line, "the request is logged")
    assert '"client": "127.0.0.9"' in line()


def test_metrics_of_haproxy_count_the_requests_of_each_replica(shared: Replicas) -> None:
    labels = {"proxy": "refused", "server": "replica2"}
    before = shared.haproxy.value("haproxy_server_sessions_total", **labels)
    for _ in range(2):
        assert shared.service.post(CHEAP).status_code == 200
    assert shared.haproxy.value("haproxy_server_sessions_total", **labels) == before + 1
    exposed = {sample.name: set(sample.labels) for sample in shared.haproxy.samples()}
    assert {name: exposed[name] for name in HAPROXY} == HAPROXY  # the series of the dashboard


def as_json(**fields: int) -> dict[str, Any]:
    return {"json": CHEAP | fields}


def as_form(path: Path, **fields: int) -> dict[str, Any]:
    form = {"digit": "7", "num_steps": "1", **{name: str(value) for name, value in fields.items()}}
    return {"data": form, "files": {"image": ("digit.png", path.read_bytes(), "image/png")}}


def test_429_is_repeated_on_the_other_replica_only_with_a_seed_or_a_key(start_all: Start, tmp_path: Path) -> None:
    """The first replica answers 429 after its first request, so that only the second one can answer more."""
    replicas = start_all({"UNFOG_RATE_LIMIT": "1/day"}, {})
    first, second = replicas.each
    assert first.post(CHEAP, **{"x-forwarded-for": "127.0.0.1"}).status_code == 200
    picture = tmp_path / "digit.png"
    picture.write_bytes(second.images(**CHEAP, seed=1)[0])

    def statuses(path: str, options: dict[str, Any], **headers: str) -> list[int]:
        client = replicas.service.client
        return [client.post(path, headers=headers, **options).status_code for _ in range(4)]

    assert sorted(statuses("/generate", as_json())) == [200, 200, 429, 429]
    assert statuses("/generate", as_json(seed=2**53 - 1)) == [200] * 4
    assert statuses("/generate", as_json(), **{"idempotency-key": "a key"}) == [200] * 4
    assert sorted(statuses("/edit", as_form(picture))) == [200, 200, 429, 429]
    assert statuses("/edit", as_form(picture, seed=3)) == [200] * 4
    # The key does not make it safe to upload a file twice.
    upload = {"data": {"purpose": "batch"}, "files": {"file": ("a.jsonl", b"{}")}}
    assert sorted(statuses("/v1/files", upload, **{"idempotency-key": "a key"})) == [200, 200, 429, 429]
    answers = [replicas.service.post(CHEAP, **{"idempotency-key": "another"}) for _ in range(2)]
    assert pngs(answers[0]) == pngs(answers[1]) == pngs(second.post(CHEAP, **{"idempotency-key": "another"}))


def test_killed_replica_fails_only_its_requests_without_a_seed(start_all: Start) -> None:
    replicas = start_all({}, {})
    victim, other = replicas.each
    work, key = LONG | {"count": 16}, "a key"
    with_seed = work | {"seed": seed_of(key)}
    expected = other.images(**with_seed)
    is_over = threading.Event()

    def send(body: dict[str, Any], **headers: str) -> list[httpx.Response]:
        answers = []
        with httpx.Client(base_url=replicas.service.url, timeout=2 * TIMEOUT) as client:
            while not is_over.is_set():
                answers.append(client.post("/generate", json=body, headers=headers))
        return answers

    def at_victim() -> list[float]:
        name = "haproxy_server_current_sessions"
        return [replicas.haproxy.value(name, proxy=each, server="replica1") for each in ("refused", "repeatable")]

    with ThreadPoolExecutor() as pool:
        plain = [pool.submit(send, work) for _ in range(2)]
        repeatable = [pool.submit(send, with_seed), pool.submit(send, work, **{"idempotency-key": key})]
        wait_until(lambda: all(at_victim()) and victim.metrics().value("running_images"), "the victim has requests")
        is_over.set()
        victim.process.signal(signal.SIGSTOP)  # so that its requests do not end before they are counted
        clients = [*plain, *repeatable]
        wait_until(lambda: sum(not each.done() for each in clients) == sum(at_victim()), "the others are served")
        num_lost, num_repeated = at_victim()
        assert num_lost and num_repeated
        victim.process.signal(signal.SIGKILL)
        assert all(pngs(answer) == expected for each in repeatable for answer in each.result())
        lost = [answer for each in plain for answer in each.result() if answer.status_code != 200]
    assert len(lost) == num_lost
    for answer in lost:
        assert_problem(answer, 502, "replica_lost")
        assert int(answer.headers["retry-after"]) >= 1
    assert replicas.service.post(CHEAP).status_code == 200
    other.process.signal(signal.SIGKILL)
    other.process.wait()
    for body in (CHEAP, CHEAP | {"seed": 1}):
        answer = replicas.service.post(body, **{"x-request-id": "nobody"})
        assert_problem(answer, 503, "no_replica")
        assert answer.headers["x-request-id"] == "nobody"


def test_replica_that_drains_under_load_loses_no_request(start_all: Start) -> None:
    replicas = start_all({}, {})
    leaving, _ = replicas.each
    answers: list[httpx.Response] = []
    is_over = threading.Event()

    def send(number: int) -> None:
        body = LONG | {"num_steps": 20} | ({"seed": number} if number % 2 else {})
        with httpx.Client(base_url=replicas.service.url, timeout=TIMEOUT) as client:
            while not is_over.is_set():
                answers.append(client.post("/generate", json=body))

    with ThreadPoolExecutor() as pool:
        sending = [pool.submit(send, number) for number in range(6)]
        wait_until(lambda: len(answers) >= 6, "the first answers arrive")
        leaving.process.signal(signal.SIGTERM)
        assert leaving.process.wait() == 0
        after = len(answers)
        wait_until(lambda: len(answers) >= after + 6, "the other replica answers")
        is_over.set()
        for each in sending:
            each.result()
    assert {answer.status_code for answer in answers} == {200}
    assert any("Draining" in line for line in leaving.process.lines)
