"""The log of a running service while its reader stalls, returns or is missing, and under hostile requests."""

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
from tests.e2e.faulty_service import fault_seed
from tests.e2e.hostile_requests import HEAD, KINDS, document, post
from tests.e2e.process import BASE, ROOT, TIMEOUT, wait_until
from tests.e2e.service import Service

FAULTY = "tests.e2e.faulty_service"
LONG_PATH = "/" + "a" * 4500  # its access log line has the maximum length
MANY = 400  # this many long lines overflow the pipe and the queue
FORGED = '{"level": "critical", "logger": "forged", "message": "forged"}'


def write_long_lines(service: Service, count: int) -> None:
    """Sends requests whose log lines are long. Their request ids are numbered."""
    for number in range(count):
        response = service.client.get(LONG_PATH, headers={"X-Request-ID": f"number.{number}"})
        assert response.status_code == 404


def log_lines(service: Service) -> list[dict[str, Any]]:
    return [json.loads(line) for line in service.process.lines]


def dropped_lines(service: Service) -> int:
    return int(service.metrics().value("log_lines_dropped_total"))


def reported_drops(service: Service) -> int:
    return sum(line["count"] for line in log_lines(service) if line["message"] == "Dropped log lines")


def test_service_answers_and_stops_while_its_log_is_not_read(start: Start) -> None:
    service = start()
    service.process.stop_reading()
    write_long_lines(service, MANY)
    assert [service.client.get(path).status_code for path in ("/livez", "/health")] == [200, 200]
    assert service.post({"digit": 7, "num_steps": 1}).status_code == 200
    assert dropped_lines(service) > 0
    service.process.signal(signal.SIGTERM)
    assert service.process.wait() == 0


def test_log_continues_and_reports_dropped_lines_when_the_reader_returns(start: Start) -> None:
    service = start()
    service.process.stop_reading()
    write_long_lines(service, MANY)
    dropped = dropped_lines(service)
    assert dropped > 0
    service.process.resume_reading()
    wait_until(lambda: reported_drops(service) == dropped, "the number of dropped lines is reported")
    service.client.get("/", headers={"X-Request-ID": "after"})
    wait_until(lambda: "after" in service.process.lines[-1], "new lines are written")
    assert dropped_lines(service) == dropped
    ids = [line.get("request_id", "") for line in log_lines(service)]
    numbers = [int(request_id.removeprefix("number.")) for request_id in ids if request_id.startswith("number.")]
    assert numbers == sorted(set(numbers))
    assert len(numbers) + dropped == MANY


def test_c_code_that_prints_or_crashes_does_not_block_while_stderr_is_not_read(start: Start) -> None:
    service = start(module=FAULTY, PYTHONFAULTHANDLER="1")
    service.process.stop_reading()
    write_long_lines(service, MANY)
    assert service.post({"digit": 7, "num_steps": 2, "seed": fault_seed("print in C", 1)}).status_code == 200
    assert service.client.get("/livez").status_code == 200
    service.process.signal(signal.SIGSEGV)
    assert service.process.wait() == -signal.SIGSEGV


def test_prints_warnings_and_thread_exceptions_are_log_lines(start: Start) -> None:
    service = start(module=FAULTY)
    assert service.post({"digit": 7, "num_steps": 2, "seed": fault_seed("noise", 1)}).status_code == 200
    service.stop()
    by_logger: dict[str, list[dict[str, Any]]] = {}
    for line in log_lines(service):
        by_logger.setdefault(line["logger"], []).append(line)
    assert [line["message"] for line in by_logger["stderr"]] == ["a print of two words", "a print without a newline"]
    (warning,) = by_logger["py.warnings"]
    assert "UserWarning: a warning" in warning["message"]
    of_thread, unraisable = by_logger["unfog.thread"]
    assert of_thread["exception"].endswith("IndexError: list index out of range")
    assert unraisable["exception"].endswith("LookupError: in a destructor")


@contextmanager
def process_with_stderr(
    descriptor: int | None, **variables: str
) -> Iterator[tuple["subprocess.Popen[bytes]", httpx.Client]]:
    """Starts a service with this descriptor as stderr (None: closed). Yields process and client without waiting."""
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
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT) as client:
            yield process, client
    finally:
        process.kill()
        process.wait(TIMEOUT)


def is_ready(client: httpx.Client) -> bool:
    with suppress(httpx.TransportError):
        return client.get("/readyz").status_code == 200
    return False


def fill_pipe(writer: int) -> None:
    """Fills the buffer of a pipe."""
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)


def test_failed_start_exits_with_status_2_while_stderr_is_not_read() -> None:
    reader, writer = os.pipe()
    fill_pipe(writer)
    with process_with_stderr(writer, UNFOG_CHECKPOINT="/nowhere.safetensors") as (process, _):
        os.close(writer)
        assert process.wait(TIMEOUT) == 2
    os.close(reader)


def test_non_blocking_stderr_pipe_loses_no_line(checkpoint: Path) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with process_with_stderr(writer, UNFOG_CHECKPOINT=str(checkpoint)) as (process, client):
        os.close(writer)
        wait_until(lambda: is_ready(client), "the service is ready")
        for number in range(100):  # this is more than the pipe holds, and less than the queue holds
            client.get(LONG_PATH, headers={"X-Request-ID": f"number.{number}"})
        process.send_signal(signal.SIGTERM)
        with os.fdopen(reader, "rb") as pipe:
            lines = [json.loads(line) for line in pipe]
        assert process.wait(TIMEOUT) == 0
    numbered = [line["request_id"] for line in lines if str(line.get("request_id")).startswith("number.")]
    assert numbered == [f"number.{number}" for number in range(100)]


@pytest.mark.parametrize("is_closed", [True, False], ids=["closed", "no reader"])
def test_service_without_a_usable_stderr_answers_and_stops(checkpoint: Path, is_closed: bool) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    variables = {"UNFOG_CHECKPOINT": str(checkpoint)}
    with process_with_stderr(None if is_closed else writer, **variables) as (process, client):
        os.close(writer)
        wait_until(lambda: is_ready(client), "the service is ready")
        assert client.post("/generate", json={"digit": 7, "num_steps": 1}).status_code == 200
        (family,) = (
            family
            for family in text_string_to_metric_families(client.get("/metrics").text)
            if family.name == "unfog_log_lines_dropped"
        )
        assert [sample.value == 0 for sample in family.samples if sample.name.endswith("_total")] == [is_closed]
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT) == 0


def hostile_requests(choose: random.Random) -> Iterator[bytes]:
    """Yields requests that try to end a log line and to inject another one."""
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
    for kind in ("random bytes", "a header", "a path", "framing", "a wrong field"):
        for _ in range(10):
            yield KINDS[kind](choose)


@pytest.mark.parametrize("is_read", [True, False], ids=["read", "unread"])
def test_hostile_requests_cannot_forge_or_break_a_log_line(start: Start, is_read: bool) -> None:
    service = start(UNFOG_READ_TIMEOUT="1", UNFOG_LOG_LEVEL="debug", UNFOG_TRUSTED_PROXIES="*")
    if not is_read:
        service.process.stop_reading()
        write_long_lines(service, MANY)
    for request in hostile_requests(random.Random(0)):
        with socket.create_connection(service.address, TIMEOUT) as client, suppress(ConnectionError):
            client.sendall(request)
            client.shutdown(socket.SHUT_WR)
            while client.recv(65536):
                pass
    assert service.client.get("/livez").status_code == 200
    service.process.resume_reading()

    def is_logged() -> bool:
        """Repeats the request, because its log line is dropped while the queue is full."""
        service.client.get("/", headers={"X-Request-ID": "the-last"})
        return any("the-last" in line for line in service.process.lines)

    wait_until(is_logged, "the last request is logged")
    assert service.stop() == 0
    lines = log_lines(service)  # fails unless every line is JSON
    assert len(lines) > 100
    for line in lines:
        assert list(line)[:4] == ["time", "level", "logger", "message"]
        assert line["level"] in ("debug", "info", "warning"), line
        assert line["logger"] != "forged"
        assert str(line.get("request_id", "a")).replace(".", "").replace("-", "").replace("_", "").isalnum()
