"""Start, readiness, drain and exit of the service, and what the probes report in each state."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest

from model.unet import UNet
from tests.e2e.conftest import Start
from tests.e2e.loading_process import LoadingProcess
from tests.e2e.process import TIMEOUT, wait_until
from tests.e2e.service import Service, assert_problem, pngs

PROBES = ("/health", "/livez", "/readyz", "/startupz")
WORK = {"digit": 4, "count": 6, "seed": 11}
ONE_ROW = {"UNFOG_MAX_BATCH": "1", "UNFOG_REQUEST_TIMEOUT": "300"}  # makes requests slow


def statuses(client: httpx.Client) -> list[int]:
    return [client.get(probe).status_code for probe in PROBES]


def images_in_service(service: Service) -> float:
    metrics = service.metrics()
    return metrics.value("queue_depth_images") + metrics.value("running_images")


@pytest.fixture
def loading(checkpoint: Path, tmp_path: Path) -> Iterator[LoadingProcess]:
    process = LoadingProcess(checkpoint, tmp_path)
    yield process
    process.close()


def test_service_answers_while_it_loads_the_checkpoint(loading: LoadingProcess, checkpoint: Path) -> None:
    client = loading.client
    health = client.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "starting")
    assert health.json()["version"] == version("unfog")
    assert statuses(client) == [503, 200, 503, 503]
    assert_problem(client.post("/generate", json={"digit": 7}), 503, "starting")
    assert_problem(client.post("/generate", json={"digit": 10}), 422, "invalid_request")
    assert "unfog_ready 0.0" in client.get("/metrics").text
    loading.finish_loading()
    loading.process.wait_until_ready()
    assert statuses(client) == [200] * 4
    assert client.post("/generate", json={"digit": 7, "num_steps": 1}).status_code == 200
    assert "unfog_ready 1.0" in client.get("/metrics").text


def is_draining(client: httpx.Client) -> bool:
    """Returns True also if the port is closed already: without admitted requests, the drain ends immediately."""
    try:
        return bool(client.get("/health").json()["status"] == "draining")
    except httpx.TransportError:
        return True


def test_sigterm_while_loading_exits_with_status_0(loading: LoadingProcess) -> None:
    assert loading.client.get("/livez").status_code == 200
    loading.process.signal(signal.SIGTERM)
    loading.finish_loading()
    assert loading.process.wait() == 0
    assert "Traceback" not in "".join(loading.process.lines)


def test_second_sigterm_while_loading_exits_with_status_0(loading: LoadingProcess) -> None:
    assert loading.client.get("/livez").status_code == 200
    loading.process.signal(signal.SIGTERM)
    wait_until(lambda: is_draining(loading.client), "the service is draining")
    loading.process.signal(signal.SIGTERM)
    loading.finish_loading()
    assert loading.process.wait() == 0
    assert not [line for line in loading.process.lines if '"level": "error"' in line or "Traceback" in line]


def test_health_reports_model_device_and_queue(service: Service, network: UNet) -> None:
    service.wait_until_idle()
    health = service.client.get("/health").json()
    assert health.pop("uptime_seconds") > 0
    assert health.pop("models") == [health["model"]]
    sha256 = health["model"].pop("sha256")
    assert health == {
        "status": "ok",
        "version": version("unfog"),
        "model": {"name": "default", "num_parameters": sum(p.numel() for p in network.parameters())},
        "device": "cpu",
        "dtype": health["dtype"],
        "compiled": False,
        "queue": {"waiting": 0, "running": 0, "capacity": 1024},
    }
    assert health["dtype"] in ("float32", "bfloat16")
    assert service.post({"digit": 1, "num_steps": 1}).json()["model"]["sha256"] == sha256
    with service.events({"digit": 1, "count": 64}) as events:
        next(event for event in events if event[0] == "progress")
        queue = service.client.get("/health").json()["queue"]
        assert queue["waiting"] + queue["running"] > 0
        assert statuses(service.client) == [200] * 4
    service.wait_until_idle()


def test_sigterm_completes_admitted_requests_and_rejects_new_ones(start: Start, service: Service) -> None:
    draining = start(**ONE_ROW, UNFOG_DRAIN_TIMEOUT="1000")
    with ThreadPoolExecutor() as pool, draining.events({**WORK, "count": 2}) as events:
        admitted = pool.submit(draining.post, WORK)
        assert next(events)[0] == "accepted"
        wait_until(lambda: images_in_service(draining) > 2, "both requests are admitted")
        draining.process.signal(signal.SIGTERM)
        wait_until(lambda: draining.client.get("/readyz").status_code == 503, "the service is not ready")
        assert statuses(draining.client) == [503, 200, 503, 503]
        assert draining.client.get("/health").json()["status"] == "draining"
        assert_problem(draining.post({"digit": 1}), 503, "draining")
        metrics = draining.metrics()
        assert metrics.value("ready") == 0
        assert metrics.value("rejected_total", reason="draining") == 1
        assert not admitted.done()
        assert [name for name, _ in events][-1] == "done"
        response = admitted.result(TIMEOUT)
    assert response.status_code == 200
    assert draining.process.wait() == 0
    assert "Traceback" not in "".join(draining.process.lines)
    assert pngs(response) == service.images(**WORK)


def test_unfinished_requests_are_503_after_the_drain_timeout(start: Start) -> None:
    draining = start(**ONE_ROW, UNFOG_DRAIN_TIMEOUT="0.1")
    with ThreadPoolExecutor() as pool, draining.events({"digit": 1, "count": 16}) as events:
        unfinished = pool.submit(draining.post, {"digit": 1, "count": 16})
        wait_until(lambda: images_in_service(draining) > 16, "both requests are admitted")
        draining.process.signal(signal.SIGINT)
        assert_problem(unfinished.result(TIMEOUT), 503, "draining")
        name, problem = list(events)[-1]
        assert (name, problem["code"], problem["status"]) == ("error", "draining", 503)
    assert draining.process.wait() == 0
    assert not [line for line in draining.process.lines if '"level": "error"' in line or "Traceback" in line]


def test_second_sigterm_ends_the_drain_and_answers_every_request(start: Start) -> None:
    draining = start(**ONE_ROW, UNFOG_DRAIN_TIMEOUT="1000")
    with ThreadPoolExecutor() as pool:
        unfinished = pool.submit(draining.post, {"digit": 1, "count": 16})
        wait_until(lambda: images_in_service(draining) > 0, "the request is admitted")
        draining.process.signal(signal.SIGTERM)
        wait_until(lambda: draining.client.get("/readyz").status_code == 503, "the service is draining")
        draining.process.signal(signal.SIGTERM)
        assert_problem(unfinished.result(TIMEOUT), 503, "draining")
    assert draining.process.wait() == 0
    assert not [line for line in draining.process.lines if '"level": "error"' in line or "Traceback" in line]


def test_every_log_line_is_json_and_has_the_request_fields(service: Service) -> None:
    service.post({"digit": 7, "num_steps": 1}, **{"x-request-id": "find-me"})
    wait_until(lambda: any("find-me" in line for line in service.process.lines), "the request is logged")
    lines = [json.loads(line) for line in service.process.lines]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    (line,) = [line for line in lines if line.get("request_id") == "find-me"]
    assert (line["route"], line["status"], line["level"]) == ("/generate", 200, "info")
    assert line["seconds"] > 0


def test_sigterm_during_imports_exits_with_status_0(checkpoint: Path) -> None:
    variables = {"UNFOG_PORT": "0", "UNFOG_CHECKPOINT": str(checkpoint)}
    command = [sys.executable, "-X", "importtime", "-m", "app"]  # prints each import to stderr
    with subprocess.Popen(command, env={**os.environ, **variables}, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        next(line for line in process.stderr if "torch" in line)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0


def test_unread_responses_do_not_delay_the_exit_and_are_not_errors(start: Start) -> None:
    draining = start(UNFOG_REQUEST_TIMEOUT="300", UNFOG_DRAIN_TIMEOUT="1", UNFOG_WRITE_TIMEOUT="300")
    body = json.dumps({"digit": 1, "count": 64, "num_steps": 1, "scale": 16}).encode()
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nX-Request-ID: unread\r\n"
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(draining.address)
        client.sendall((head + b"Content-Length: %d\r\n\r\n" % len(body) + body) * 100)
        wait_until(
            lambda: draining.metrics().value("requests_total", route="/generate", code="200") > 5,
            "more than 5 responses have been sent",
        )
        draining.wait_until_idle()
        draining.process.signal(signal.SIGTERM)
        assert draining.process.wait() == 0
    assert not [line for line in draining.process.lines if '"level": "error"' in line or "Traceback" in line]
    lines = [json.loads(line) for line in draining.process.lines if '"unread"' in line]
    assert {line["outcome"] for line in lines} <= {"ok", "draining", "client_gone"}
    assert lines[-1]["outcome"] != "ok"  # the client has not received all of the last response
