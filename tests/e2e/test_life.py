"""From the first moment to the last: starting, serving, draining, gone; and what the probes say of each."""

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
from tests.e2e.loading import Loading
from tests.e2e.process import PATIENCE, eventually
from tests.e2e.service import Service, assert_problem, pngs

PROBES = ("/health", "/livez", "/readyz", "/startupz")
WORK = {"digit": 4, "count": 10, "seed": 11}
ONE_ROW = {"UNFOG_MAX_BATCH": "1", "UNFOG_REQUEST_TIMEOUT": "300"}  # so that work takes long


def statuses(client: httpx.Client) -> list[int]:
    return [client.get(probe).status_code for probe in PROBES]


def images_inside(service: Service) -> float:
    metrics = service.metrics()
    return metrics.of("queue_depth_images") + metrics.of("running_images")


@pytest.fixture
def loading(checkpoint: Path, tmp_path: Path) -> Iterator[Loading]:
    process = Loading(checkpoint, tmp_path)
    yield process
    process.end()


def test_http_answers_while_the_checkpoint_is_loaded(loading: Loading, checkpoint: Path) -> None:
    client = loading.client
    health = client.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "starting")
    assert health.json()["version"] == version("unfog")
    assert statuses(client) == [503, 200, 503, 503]
    assert_problem(client.post("/generate", json={"digit": 7}), 503, "starting")
    assert_problem(client.post("/generate", json={"digit": 10}), 422, "invalid_request")
    assert "unfog_ready 0.0" in client.get("/metrics").text
    loading.go_on()
    loading.process.wait_until_ready()
    assert statuses(client) == [200] * 4
    assert client.post("/generate", json={"digit": 7, "num_steps": 1}).status_code == 200
    assert "unfog_ready 1.0" in client.get("/metrics").text


def test_sigterm_while_the_checkpoint_is_loaded_is_a_clean_end(loading: Loading) -> None:
    assert loading.client.get("/livez").status_code == 200
    loading.process.signal(signal.SIGTERM)
    loading.go_on()
    assert loading.process.wait() == 0
    assert "Traceback" not in "".join(loading.process.lines)


def test_two_signals_while_the_checkpoint_is_loaded_are_a_clean_end(loading: Loading) -> None:
    assert loading.client.get("/livez").status_code == 200
    loading.process.signal(signal.SIGTERM)
    eventually(lambda: loading.client.get("/health").json()["status"] == "draining", "it drains")
    loading.process.signal(signal.SIGTERM)
    loading.go_on()
    assert loading.process.wait() == 0
    assert not [line for line in loading.process.lines if '"level": "error"' in line or "Traceback" in line]


def test_health_tells_what_is_served_and_how_busy_it_is(service: Service, network: UNet) -> None:
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


def test_sigterm_finishes_what_was_admitted_and_takes_nothing_new(start: Start, service: Service) -> None:
    draining = start(**ONE_ROW, UNFOG_DRAIN_TIMEOUT="1000")
    with ThreadPoolExecutor() as pool, draining.events({**WORK, "count": 2}) as events:
        admitted = pool.submit(draining.post, WORK)
        assert next(events)[0] == "accepted"
        eventually(lambda: images_inside(draining) > 2, "both requests are admitted")
        draining.process.signal(signal.SIGTERM)
        eventually(lambda: draining.client.get("/readyz").status_code == 503, "it is not ready")
        assert statuses(draining.client) == [503, 200, 503, 503]
        assert draining.client.get("/health").json()["status"] == "draining"
        assert_problem(draining.post({"digit": 1}), 503, "draining")
        metrics = draining.metrics()
        assert metrics.of("ready") == 0
        assert metrics.of("rejected_total", reason="draining") == 1
        assert not admitted.done()
        assert [name for name, _ in events][-1] == "done"
        answer = admitted.result(PATIENCE)
    assert answer.status_code == 200
    assert draining.process.wait() == 0
    assert "Traceback" not in "".join(draining.process.lines)
    assert pngs(answer) == service.images(**WORK)


def test_what_is_unfinished_after_the_drain_timeout_is_answered(start: Start) -> None:
    draining = start(**ONE_ROW, UNFOG_DRAIN_TIMEOUT="0.1")
    with ThreadPoolExecutor() as pool, draining.events({"digit": 1, "count": 64}) as events:
        unfinished = pool.submit(draining.post, {"digit": 1, "count": 64})
        eventually(lambda: images_inside(draining) > 64, "both requests are admitted")
        draining.process.signal(signal.SIGINT)
        assert_problem(unfinished.result(PATIENCE), 503, "draining")
        name, problem = list(events)[-1]
        assert (name, problem["code"], problem["status"]) == ("error", "draining", 503)
    assert draining.process.wait() == 0
    assert not [line for line in draining.process.lines if '"level": "error"' in line or "Traceback" in line]


def test_a_second_signal_waits_for_nobody_and_still_answers_everyone(start: Start) -> None:
    draining = start(**ONE_ROW, UNFOG_DRAIN_TIMEOUT="1000")
    with ThreadPoolExecutor() as pool:
        unfinished = pool.submit(draining.post, {"digit": 1, "count": 64})
        eventually(lambda: images_inside(draining) > 0, "the request is admitted")
        draining.process.signal(signal.SIGTERM)
        eventually(lambda: draining.client.get("/readyz").status_code == 503, "it drains")
        draining.process.signal(signal.SIGTERM)
        assert_problem(unfinished.result(PATIENCE), 503, "draining")
    assert draining.process.wait() == 0
    assert not [line for line in draining.process.lines if '"level": "error"' in line or "Traceback" in line]


def test_every_line_of_the_log_is_json_with_what_a_log_is_searched_for(service: Service) -> None:
    service.post({"digit": 7, "num_steps": 1}, **{"x-request-id": "find-me"})
    eventually(lambda: any("find-me" in line for line in service.process.lines), "the request is logged")
    lines = [json.loads(line) for line in service.process.lines]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    (line,) = [line for line in lines if line.get("request_id") == "find-me"]
    assert (line["route"], line["status"], line["level"]) == ("/generate", 200, "info")
    assert line["seconds"] > 0


def test_sigterm_while_it_still_imports_ends_it_with_status_0(checkpoint: Path) -> None:
    variables = {"UNFOG_PORT": "0", "UNFOG_CHECKPOINT": str(checkpoint)}
    command = [sys.executable, "-X", "importtime", "-m", "app"]  # says on stderr what it has imported
    with subprocess.Popen(command, env={**os.environ, **variables}, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        next(line for line in process.stderr if "torch" in line)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 0


def test_an_answer_that_nobody_takes_does_not_hold_up_the_end_and_is_no_error(start: Start) -> None:
    draining = start(UNFOG_REQUEST_TIMEOUT="300", UNFOG_DRAIN_TIMEOUT="1", UNFOG_WRITE_TIMEOUT="300")
    body = json.dumps({"digit": 1, "count": 64, "num_steps": 1, "scale": 16}).encode()
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nX-Request-ID: unread\r\n"
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(draining.address)
        client.sendall((head + b"Content-Length: %d\r\n\r\n" % len(body) + body) * 100)
        eventually(lambda: draining.metrics().of("requests_total", route="/generate", code="200") > 5, "it answers")
        draining.wait_until_idle()
        draining.process.signal(signal.SIGTERM)
        assert draining.process.wait() == 0
    assert not [line for line in draining.process.lines if '"level": "error"' in line or "Traceback" in line]
    lines = [json.loads(line) for line in draining.process.lines if '"unread"' in line]
    assert {line["outcome"] for line in lines} <= {"ok", "draining", "client_gone"}
    assert lines[-1]["outcome"] != "ok"  # of the last one the client has not got everything
