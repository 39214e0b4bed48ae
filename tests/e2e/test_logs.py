"""The log through a real process: readers that stall, come back, leave or were never there, and hostile requests."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.conftest import Start
from tests.e2e.faulty import seed_of
from tests.e2e.hostile import HEAD, KINDS, document, post
from tests.e2e.process import BASE, PATIENCE, ROOT, eventually
from tests.e2e.service import Service

FAULTY = "tests.e2e.faulty"
LONG_PATH = "/" + "a" * 4500  # its line is as long as lines become
MANY = 400  # such lines are more than the pipe and the queue hold
FORGED = '{"level": "critical", "logger": "forged", "message": "forged"}'


def ask(service: Service, count: int) -> None:
    """Makes requests whose lines are long; their ids are numbers."""
    for number in range(count):
        answer = service.client.get(LONG_PATH, headers={"X-Request-ID": f"number.{number}"})
        assert answer.status_code == 404


def fields(service: Service) -> list[dict[str, Any]]:
    return [json.loads(line) for line in service.process.lines]


def drops(service: Service) -> int:
    return int(service.metrics().of("log_lines_dropped_total"))


def reported(service: Service) -> int:
    return sum(line["count"] for line in fields(service) if line["message"] == "Dropped log lines")


def test_service_answers_and_stops_while_nobody_reads_its_log(start: Start) -> None:
    service = start()
    service.process.pause()
    ask(service, MANY)
    assert [service.client.get(path).status_code for path in ("/livez", "/health")] == [200, 200]
    assert service.post({"digit": 7, "num_steps": 1}).status_code == 200
    assert drops(service) > 0
    service.process.signal(signal.SIGTERM)
    assert service.process.wait() == 0


def test_log_goes_on_and_reports_every_dropped_line_when_the_reader_is_back(start: Start) -> None:
    service = start()
    service.process.pause()
    ask(service, MANY)
    dropped = drops(service)
    assert dropped > 0
    service.process.resume()
    eventually(lambda: reported(service) == dropped, "the number of dropped lines is reported")
    service.client.get("/", headers={"X-Request-ID": "after"})
    eventually(lambda: "after" in service.process.lines[-1], "lines come again")
    assert drops(service) == dropped
    ids = [line.get("request_id", "") for line in fields(service)]
    numbers = [int(request_id.removeprefix("number.")) for request_id in ids if request_id.startswith("number.")]
    assert numbers == sorted(set(numbers))
    assert len(numbers) + dropped == MANY


def test_c_code_that_prints_or_crashes_does_not_hang_while_nobody_reads(start: Start) -> None:
    service = start(module=FAULTY, PYTHONFAULTHANDLER="1")
    service.process.pause()
    ask(service, MANY)
    assert service.post({"digit": 7, "num_steps": 2, "seed": seed_of("print in C", 1)}).status_code == 200
    assert service.client.get("/livez").status_code == 200
    service.process.signal(signal.SIGSEGV)
    assert service.process.wait() == -signal.SIGSEGV


def test_prints_warnings_and_exceptions_of_threads_are_log_lines(start: Start) -> None:
    service = start(module=FAULTY)
    assert service.post({"digit": 7, "num_steps": 2, "seed": seed_of("noise", 1)}).status_code == 200
    service.end()
    by_logger: dict[str, list[dict[str, Any]]] = {}
    for line in fields(service):
        by_logger.setdefault(line["logger"], []).append(line)
    assert [line["message"] for line in by_logger["stderr"]] == ["a print of two words", "a print without an end"]
    (warning,) = by_logger["py.warnings"]
    assert "UserWarning: a warning" in warning["message"]
    of_thread, unraisable = by_logger["unfog.thread"]
    assert of_thread["exception"].endswith("IndexError: list index out of range")
    assert unraisable["exception"].endswith("LookupError: in a destructor")


@contextmanager
def process_with_stderr(
    descriptor: int | None, **variables: str
) -> Iterator[tuple["subprocess.Popen[bytes]", httpx.Client]]:
    """A service whose stderr is this descriptor, or closed, and a client for it; it may not be ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("UNFOG_")}
    command = ["sh", "-c", 'exec "$0" -m app 2>&-', sys.executable] if descriptor is None else None
    process = subprocess.Popen(
        command or [sys.executable, "-m", "app"],
        cwd=ROOT,
        env=clean | BASE | {"UNFOG_PORT": str(port)} | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=descriptor,
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as client:
            yield process, client
    finally:
        process.kill()
        process.wait(PATIENCE)


def is_ready(client: httpx.Client) -> bool:
    with suppress(httpx.TransportError):
        return client.get("/readyz").status_code == 200
    return False


def fill(writer: int) -> None:
    """Leaves no room in a pipe."""
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)


def test_start_that_fails_exits_with_status_2_while_nobody_reads() -> None:
    reader, writer = os.pipe()
    fill(writer)
    with process_with_stderr(writer, UNFOG_CHECKPOINT="/nowhere.safetensors") as (process, _):
        os.close(writer)
        assert process.wait(PATIENCE) == 2
    os.close(reader)


def test_pipe_that_somebody_made_non_blocking_loses_no_line(checkpoint: Path) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with process_with_stderr(writer, UNFOG_CHECKPOINT=str(checkpoint)) as (process, client):
        os.close(writer)
        eventually(lambda: is_ready(client), "it is ready")
        for number in range(100):  # more than the pipe holds, less than the queue
            client.get(LONG_PATH, headers={"X-Request-ID": f"number.{number}"})
        process.send_signal(signal.SIGTERM)
        with os.fdopen(reader, "rb") as pipe:
            lines = [json.loads(line) for line in pipe]
        assert process.wait(PATIENCE) == 0
    numbered = [line["request_id"] for line in lines if str(line.get("request_id")).startswith("number.")]
    assert numbered == [f"number.{number}" for number in range(100)]


@pytest.mark.parametrize("is_closed", [True, False], ids=["closed", "without a reader"])
def test_service_without_a_log_serves_and_stops(checkpoint: Path, is_closed: bool) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    variables = {"UNFOG_CHECKPOINT": str(checkpoint)}
    with process_with_stderr(None if is_closed else writer, **variables) as (process, client):
        os.close(writer)
        eventually(lambda: is_ready(client), "it is ready")
        assert client.post("/generate", json={"digit": 7, "num_steps": 1}).status_code == 200
        (family,) = (
            family
            for family in text_string_to_metric_families(client.get("/metrics").text)
            if family.name == "unfog_log_lines_dropped"
        )
        assert [sample.value == 0 for sample in family.samples if sample.name.endswith("_total")] == [is_closed]
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0


def hostile_requests(choose: random.Random) -> Iterator[bytes]:
    """Requests that try to end a log line and to write another one."""
    forged = FORGED.encode()
    end = b"Host: x\r\nConnection: close\r\n\r\n"
    for newline in (
        b"\n",
        b"\r",
        b"\r\n",
        b"%0a",
        b"%0d%0a",
        b"\\n",
        b"\xe2\x80\xa8",
        b"\xc2\x85",
        b"\0",
        b'"}\n',
        b"\x1b[2J",
    ):
        line = newline + forged + newline
        squeezed = line.replace(b" ", b"")
        yield b"GET /" + squeezed + b" HTTP/1.1\r\n" + end
        yield b"GET /?" + squeezed + b" HTTP/1.1\r\n" + end
        yield squeezed + b" / HTTP/1.1\r\n" + end
        yield b"GET / HTTP/1.1" + line + b"\r\n" + end
        yield line
        for name in (b"X-Request-ID", b"Accept", b"traceparent", b"X-Forwarded-For", b"Content-Type", b"User-Agent"):
            yield b"GET / HTTP/1.1\r\n" + name + b": " + line + b"\r\n" + end
            yield post(document(choose), name + b": " + line, b"Connection: close")
        yield HEAD + b"X-Request-ID: a\r\n " + line + b"\r\n" + end
        yield post(json.dumps({"digit": 7, "model": line.decode("utf-8", "replace")}).encode(), b"Connection: close")
        yield post(json.dumps({line.decode("utf-8", "replace"): 7}).encode(), b"Connection: close")
    for kind in ("noise", "a header", "a path", "framing", "a wrong field"):
        for _ in range(10):
            yield KINDS[kind](choose)


@pytest.mark.parametrize("is_read", [True, False], ids=["read", "unread"])
def test_hostile_requests_cannot_forge_or_break_a_line(start: Start, is_read: bool) -> None:
    service = start(UNFOG_READ_TIMEOUT="1", UNFOG_LOG_LEVEL="debug", UNFOG_TRUSTED_PROXIES="*")
    if not is_read:
        service.process.pause()
        ask(service, MANY)
    for request in hostile_requests(random.Random(0)):
        with socket.create_connection(service.address, PATIENCE) as client, suppress(ConnectionError):
            client.sendall(request)
            client.shutdown(socket.SHUT_WR)
            while client.recv(65536):
                pass
    assert service.client.get("/livez").status_code == 200
    service.process.resume()

    def is_logged() -> bool:
        """A request's line is dropped while the queue is full."""
        service.client.get("/", headers={"X-Request-ID": "the-last"})
        return any("the-last" in line for line in service.process.lines)

    eventually(is_logged, "the log has caught up")
    assert service.end() == 0
    lines = fields(service)  # each is JSON
    assert len(lines) > 100
    for line in lines:
        assert list(line)[:4] == ["time", "level", "logger", "message"]
        assert line["level"] in ("debug", "info", "warning"), line
        assert line["logger"] != "forged"
        assert str(line.get("request_id", "a")).replace(".", "").replace("-", "").replace("_", "").isalnum()
