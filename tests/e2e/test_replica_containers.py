"""Runs the compose project with two replicas behind HAProxy. Needs --containers and a Docker engine."""

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.containers.stack import BUILD_PATIENCE, PATIENCE, Stack, docker, eventually
from tests.e2e.service import EVENTS, JSON, assert_problem, pngs, read_events

LONG = {"digit": 3, "count": 8, "num_steps": 100}
CHEAP = {"digit": 3, "num_steps": 1}
NO_CAPABILITIES = "0" * 16

pytestmark = pytest.mark.timeout(BUILD_PATIENCE + 10 * PATIENCE)


@pytest.fixture(scope="module")
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Builds the images and starts the project without Grafana. Prints the logs of the services if a test failed."""
    if not request.config.getoption("--containers"):
        pytest.skip("builds and runs images: needs --containers and a Docker engine")
    folder = tmp_path_factory.mktemp("replicas")
    (folder / "without-grafana.yml").write_text(yaml.safe_dump({"services": {"grafana": {"profiles": ["unused"]}}}))
    files = ("docker-compose.replicas.yml", str(folder / "without-grafana.yml"))
    stack = Stack(folder, request.config.getoption("--wheels"), *files)
    variables = {"UNFOG_RATE_LIMIT": "1000000/hour", "UNFOG_NUM_THREADS": "1", "UNFOG_REQUEST_TIMEOUT": str(PATIENCE)}
    stack.environment |= variables
    failed_before = request.session.testsfailed
    try:
        stack.build()
        stack.up()
        yield stack
        if request.session.testsfailed > failed_before:
            print(stack.compose("logs", "--no-color", "--tail", "200"))
    finally:
        stack.remove()


@pytest.fixture(autouse=True)
def both_ready(stack: Stack) -> None:
    """Waits until both replicas are ready and HAProxy uses them, also after a test has stopped or killed one."""
    eventually(lambda: health(stack) == ["healthy"] * 2, "both replicas are healthy")
    eventually(lambda: ready_servers(stack) == 2, "HAProxy uses both replicas")


def health(stack: Stack) -> list[str]:
    return [container["State"]["Health"]["Status"] for container in stack.containers("unfog")]


def ready_servers(stack: Stack) -> int:
    """Returns how many servers of a backend of HAProxy are up."""
    text = stack.compose("exec", "-T", "haproxy", "wget", "-q", "-O", "-", "http://127.0.0.1:8404/metrics?no-maint")
    lines = (line for line in text.splitlines() if line.startswith('haproxy_server_status{proxy="refused"'))
    return sum('state="UP"' in line and line.endswith(" 1") for line in lines)


def generate(stack: Stack, body: dict[str, Any], **headers: str) -> httpx.Response:
    return httpx.post(stack.url("unfog", "/generate"), json=body, headers=headers, timeout=PATIENCE)


def gauge(container: Any, name: str) -> float:
    """Returns the value of a gauge of one replica."""
    program = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:8000/metrics').read().decode())"
    text = docker("exec", container["Id"], "python", "-c", program)
    (line,) = [line for line in text.splitlines() if line.startswith(f"unfog_{name} ")]
    return float(line.split()[1])


def running(stack: Stack) -> list[float]:
    """Returns the number of images that each replica computes."""
    return [gauge(container, "running_images") for container in stack.containers("unfog")]


def test_containers_of_the_replicas_run_without_privileges(stack: Stack) -> None:
    for service in ("haproxy", "postgres", "redis"):
        status = stack.status_of(service)
        assert [status[name] for name in ("CapEff", "CapPrm", "CapBnd")] == [NO_CAPABILITIES] * 3, service
        assert status["NoNewPrivs"] == "1", service
        assert "0" not in status["Uid"].split(), service
        assert stack.container(service)["HostConfig"]["ReadonlyRootfs"], service


def test_prometheus_scrapes_both_replicas_and_haproxy(stack: Stack) -> None:
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda _: generate(stack, LONG), range(8)))
    assert {answer.status_code for answer in answers} == {200}
    eventually(lambda: len(stack.query('up{job="unfog"} == 1')) == 2, "Prometheus has scraped both replicas")
    eventually(lambda: stack.value('up{job="haproxy"}'), "Prometheus has scraped HAProxy")
    served = 'unfog_requests_total{route="/generate",code="200"} > 0'
    eventually(lambda: len(stack.query(served)) == 2, "both replicas have served requests")


def test_formats_errors_and_openai_route_work_through_haproxy(stack: Stack) -> None:
    types = {JSON: JSON, "image/png": "image/png", "application/zip": "application/zip", EVENTS: EVENTS}
    for accept, media_type in types.items():
        answer = generate(stack, CHEAP, accept=accept)
        assert (answer.status_code, answer.headers["content-type"].split(";")[0]) == (200, media_type)
    assert_problem(generate(stack, {"digit": 11}), 422, "invalid_request")
    answer = generate(stack, CHEAP, **{"x-request-id": "mine"})
    assert answer.headers.get_list("x-request-id") == ["mine"]
    assert stack.get("unfog", "/health").json()["status"] == "ok"
    url = stack.url("unfog", "/v1/images/generations")
    assert httpx.post(url, json={"prompt": "7", "size": "28x28"}, timeout=PATIENCE).status_code == 200


def test_stream_arrives_while_its_images_run_and_its_end_frees_their_rows(stack: Stack) -> None:
    body = LONG | {"count": 64}
    with (
        httpx.Client(base_url=stack.url("unfog", ""), timeout=PATIENCE) as client,
        client.stream("POST", "/generate?previews=100", json=body, headers={"accept": EVENTS}) as response,
    ):
        events = read_events(response)
        assert [next(events)[0] for _ in range(2)] == ["accepted", "progress"]
        assert sum(running(stack)) > 0
    eventually(lambda: running(stack) == [0, 0], "the rows are free")


def test_file_that_one_replica_has_stored_is_found_by_the_other(stack: Stack) -> None:
    line = {"custom_id": "a", "method": "POST", "url": "/generate", "body": CHEAP}
    upload = {"data": {"purpose": "batch"}, "files": {"file": ("a.jsonl", json.dumps(line).encode())}}
    stored = httpx.post(stack.url("unfog", "/v1/files"), timeout=PATIENCE, **upload)  # type: ignore[arg-type]
    assert stored.status_code == 200, stored.text
    path = f"/v1/files/{stored.json()['id']}"
    assert [stack.get("unfog", path).status_code for _ in range(4)] == [200] * 4  # HAProxy alternates.


def test_replicas_count_the_requests_of_an_address_together_in_redis(stack: Stack) -> None:
    assert generate(stack, CHEAP).status_code == 200
    (network,) = json.loads(docker("network", "inspect", f"{stack.name}_default"))
    address = network["IPAM"]["Config"][0]["Gateway"]  # Docker forwards requests of this machine from its gateway.
    keys = stack.compose("exec", "-T", "redis", "redis-cli", "keys", "*").split()
    assert keys and all(f"address:{address}/" in key for key in keys)


def test_killed_replica_fails_only_its_requests_without_a_seed(stack: Stack) -> None:
    body = LONG | {"count": 12}
    (expected,) = {tuple(pngs(generate(stack, body | {"seed": 7})))}
    victim = stack.containers("unfog")[0]
    command = Path(f"/proc/{victim['State']['Pid']}/cmdline")
    if os.geteuid() or not command.exists() or command.read_bytes() != b"python\0-m\0app\0":
        pytest.skip("kills the process on the host: needs root and a Docker engine on this machine")
    with ThreadPoolExecutor() as pool:

        def send(body: dict[str, Any]) -> Future[httpx.Response]:
            return pool.submit(generate, stack, body)

        plain, repeatable = [send(body) for _ in range(2)], [send(body | {"seed": 7}) for _ in range(2)]
        # Two requests and that of the metrics.
        eventually(lambda: gauge(victim, "requests_in_progress") == 3, "the victim has half of the requests")
        assert gauge(victim, "running_images")
        os.kill(victim["State"]["Pid"], signal.SIGKILL)
        lost, served = sorted((each.result() for each in plain), key=lambda answer: -answer.status_code)
        assert {tuple(pngs(each.result())) for each in repeatable} == {expected}
    assert served.status_code == 200
    assert_problem(lost, 502, "replica_lost")
    eventually(lambda: stack.containers("unfog")[0]["RestartCount"] == 1, "the container was restarted")


def test_stop_of_one_replica_under_load_loses_no_request(stack: Stack) -> None:
    leaving = stack.containers("unfog")[1]["Id"]
    with ThreadPoolExecutor() as pool:
        stopping = pool.submit(docker, "stop", "--time", "140", leaving)
        statuses = []
        while not stopping.done():
            answers = [pool.submit(generate, stack, CHEAP) for _ in range(4)]
            statuses += [answer.result().status_code for answer in answers]
        stopping.result()
    assert set(statuses) == {200}
    docker("start", leaving)


def test_compose_stop_completes_admitted_requests_of_all_replicas(stack: Stack) -> None:
    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(generate, stack, LONG) for _ in range(4)]
        eventually(lambda: all(running(stack)), "both replicas have requests")
        stack.compose("stop")
        assert [answer.result().status_code for answer in answers] == [200] * 4
    for service in ("unfog", "haproxy"):
        for container in stack.containers(service):
            state = container["State"]
            assert (state["Status"], state["ExitCode"]) == ("exited", 0), service
