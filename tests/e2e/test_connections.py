"""Slow, silent, half-closed and non-HTTP connections are closed and do not affect other clients."""

import json
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.conftest import start_service
from tests.e2e.process import TIMEOUT, wait_until
from tests.e2e.service import Service

BODY = json.dumps({"digit": 7, "num_steps": 1, "seed": 1}).encode()
LONG = json.dumps({"digit": 7, "count": 64, "seed": 1}).encode()
HEAD = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
READ_TIMEOUT, WRITE_TIMEOUT = 0.5, 1.0
UNREAD_RESPONSES = 40  # 400 kB each, more in total than the kernel buffers for a client


@pytest.fixture(scope="module")
def short_timeouts(checkpoint: Path) -> Iterator[Service]:
    """A service with a read timeout of 0.5 s and a write timeout of 1 s."""
    with ExitStack() as stack:
        yield start_service(
            stack,
            checkpoint,
            UNFOG_MAX_BATCH="64",
            UNFOG_REQUEST_TIMEOUT="300",
            UNFOG_READ_TIMEOUT=str(READ_TIMEOUT),
            UNFOG_WRITE_TIMEOUT=str(WRITE_TIMEOUT),
        )


@contextmanager
def connection(service: Service, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    """Opens a TCP connection to the service."""
    with socket.socket() as client:
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(TIMEOUT)
        client.connect(service.address)
        yield client


def request(body: bytes, *more: bytes) -> bytes:
    return HEAD + b"".join(line + b"\r\n" for line in more) + b"Content-Length: %d\r\n\r\n" % len(body) + body


def read_to_end(client: socket.socket) -> bytes:
    """Reads until the server closes or resets the connection."""
    received = b""
    with suppress(ConnectionResetError):
        while piece := client.recv(65536):
            received += piece
    return received


def problem_in(response: bytes) -> dict[str, Any]:
    """Returns the problem document of the last response and checks its headers."""
    head, _, body = response[response.rindex(b"HTTP/1.1") :].partition(b"\r\n\r\n")
    assert b"application/problem+json" in head
    assert b"connection: close" in head.lower()
    problem: dict[str, Any] = json.loads(body)
    assert problem["request_id"].encode() in head
    return problem


def descriptors(service: Service) -> int:
    return psutil.Process(service.process.pid).num_fds()


def test_silent_connection_is_closed(short_timeouts: Service) -> None:
    with connection(short_timeouts) as client:
        assert read_to_end(client) == b""


@pytest.mark.parametrize(
    "head", [b"P", b"POST /generate HTTP/1.1\r\n", HEAD], ids=["one-byte", "one-line", "all-but-end"]
)
def test_incomplete_head_is_408(short_timeouts: Service, head: bytes) -> None:
    with connection(short_timeouts) as client:
        client.sendall(head)
        problem = problem_in(read_to_end(client))
    assert (problem["status"], problem["code"]) == (408, "request_timeout")


def test_head_that_arrives_byte_by_byte_is_408(short_timeouts: Service) -> None:
    """Slowloris: the read timeout applies to the whole head, not to each byte."""
    with connection(short_timeouts) as client:
        client.settimeout(READ_TIMEOUT / 5)
        received, sent = b"", 0
        while b"}" not in received:
            assert sent < 500, "the server never times out"
            try:
                client.sendall(HEAD[:1] if not sent else b"A")
                sent += 1
                received += client.recv(65536)
            except TimeoutError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                break
    assert problem_in(received)["code"] == "request_timeout"


def test_incomplete_second_head_on_a_connection_is_408(short_timeouts: Service) -> None:
    with connection(short_timeouts) as client:
        client.sendall(request(BODY))
        first = client.recv(65536)
        assert first.startswith(b"HTTP/1.1 200")
        client.sendall(b"POST /gen")
        assert problem_in(read_to_end(client))["code"] == "request_timeout"


def test_incomplete_body_is_408(short_timeouts: Service) -> None:
    with connection(short_timeouts) as client:
        client.sendall(HEAD + b"Content-Length: 1000\r\n\r\n{")
        response = read_to_end(client)
    assert problem_in(response)["code"] == "request_timeout"
    assert b"HTTP/1.1 408" in response


def test_generation_may_take_longer_than_the_read_timeout(short_timeouts: Service) -> None:
    body = json.dumps({"digit": 7, "count": 64, "seed": 1, "scale": 2}).encode()
    with connection(short_timeouts) as client:
        client.sendall(request(body, b"Connection: close"))
        assert read_to_end(client).startswith(b"HTTP/1.1 200")


def is_connected(service: Service, client: socket.socket) -> bool:
    """Returns whether the service has an open connection to this client."""
    connections = psutil.Process(service.process.pid).net_connections("tcp")
    return any(each.raddr == client.getsockname() for each in connections)


def test_client_that_does_not_read_is_disconnected(short_timeouts: Service) -> None:
    with connection(short_timeouts, receive_buffer=4096) as client:
        client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * UNREAD_RESPONSES)
        wait_until(lambda: is_connected(short_timeouts, client), "the client is connected")
        wait_until(lambda: not is_connected(short_timeouts, client), "the client is disconnected")
        assert 0 < read_to_end(client).count(b"HTTP/1.1 200") < UNREAD_RESPONSES
    short_timeouts.wait_until_idle()


def test_event_stream_of_a_client_that_does_not_read_is_closed(short_timeouts: Service) -> None:
    head = b"POST /generate?previews=100 HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    more = b"Accept: text/event-stream\r\nX-Request-ID: unread\r\nContent-Length: %d\r\n\r\n" % len(LONG)
    with connection(short_timeouts, receive_buffer=4096) as client:
        client.sendall(head + more + LONG)
        wait_until(lambda: any("unread" in line for line in short_timeouts.process.lines), "the request is logged")
    (line,) = [json.loads(line) for line in short_timeouts.process.lines if "unread" in line]
    assert (line["status"], line["outcome"]) == (200, "client_gone")
    short_timeouts.wait_until_idle()


# Its previews (6 MB) are more than the kernel buffers for a client that does not read.
LARGE = {"digit": 6, "count": 64, "seed": 1, "num_steps": 80, "guidance_scale": 1}


def request_stream(client: socket.socket, body: dict[str, Any]) -> None:
    """Requests an event stream without reading it."""
    content = json.dumps(body).encode()
    head = HEAD.replace(b"/generate", b"/generate?previews=80")
    more = b"Accept: text/event-stream\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(content)
    client.sendall(head + more + content)


def events_in(response: bytes) -> list[tuple[str, dict[str, Any]]]:
    """Returns the name and data of each event. Assumes that no event is split between chunks."""
    chunks = response.decode().split("\r\n")
    events = [event for chunk in chunks for event in chunk.split("\n\n") if event.startswith("event: ")]
    return [(name[7:], json.loads(data[6:])) for name, data, *_ in (event.split("\n") for event in events)]


def test_slowly_read_stream_is_complete_if_its_images_met_the_deadline(service: Service) -> None:
    timeout = 3 + 3 * service.post(LARGE).json()["timing"]["total_seconds"]
    generated = service.metrics().value("images_total", digit="6")
    with connection(service, receive_buffer=4096) as client:
        start = time.monotonic()
        request_stream(client, {**LARGE, "timeout_seconds": timeout})
        service.wait_for(generated + 64, "images_total", digit="6")
        assert time.monotonic() - start < timeout, "this machine is too slow for the deadline"
        time.sleep(start + timeout + 0.5 - time.monotonic())  # let the deadline pass before reading
        names = [name for name, _ in events_in(read_to_end(client))]
    assert names.count("image") == 64
    assert (names[0], names[-1]) == ("accepted", "done")


def test_slowly_read_stream_ends_with_an_error_if_its_images_were_late(service: Service) -> None:
    late = service.metrics().value("rejected_total", reason="deadline")
    with connection(service, receive_buffer=4096) as client:
        request_stream(client, {**LARGE, "timeout_seconds": 0.2})
        service.wait_until_idle()
        events = events_in(read_to_end(client))
    assert events[-1][0] == "error"
    assert events[-1][1]["code"] == "deadline_exceeded"
    assert "done" not in [name for name, _ in events]
    service.wait_for(late + 1, "rejected_total", reason="deadline")


def test_half_closed_connection_cancels_the_request(short_timeouts: Service) -> None:
    short_timeouts.wait_until_idle()
    before = short_timeouts.metrics().value("cancelled_total", stage="running")
    with connection(short_timeouts) as client:
        client.sendall(request(LONG))
        short_timeouts.wait_until_running()
        client.shutdown(socket.SHUT_WR)
        assert read_to_end(client) == b""
    short_timeouts.wait_until_idle()
    assert short_timeouts.metrics().value("cancelled_total", stage="running") > before


def test_reset_connection_cancels_the_request(short_timeouts: Service) -> None:
    short_timeouts.wait_until_idle()
    with connection(short_timeouts) as client:
        client.sendall(request(LONG))
        short_timeouts.wait_until_running()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    short_timeouts.wait_until_idle()


FURTHER_BYTES = {
    "empty line": b"\r\n",
    "one byte": b"x",
    "second request": request(BODY),
    "empty line and second request": b"\r\n" + request(BODY),
}


@pytest.mark.parametrize("resets", [False, True], ids=["close", "reset"])
@pytest.mark.parametrize("header", [b"X: y", b"Accept: text/event-stream", b"Connection: close", b"Upgrade: h2c"])
@pytest.mark.parametrize("further", FURTHER_BYTES.values(), ids=FURTHER_BYTES)
def test_client_that_sends_more_and_disconnects_frees_its_rows(
    short_timeouts: Service, further: bytes, header: bytes, resets: bool
) -> None:
    short_timeouts.wait_until_idle()
    before = short_timeouts.metrics()
    with connection(short_timeouts) as client:
        client.sendall(request(LONG, header))
        short_timeouts.wait_until_running()
        for i in range(2):  # two writes, so that the server reads twice
            client.sendall(further[i * len(further) // 2 : (i + 1) * len(further) // 2])
            assert short_timeouts.client.get("/livez").status_code == 200
        if resets:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    short_timeouts.wait_until_idle()
    after = short_timeouts.metrics()
    assert after.value("cancelled_total", stage="running") - before.value("cancelled_total", stage="running") == 64
    assert after.value("images_total", digit="7") == before.value("images_total", digit="7")


@pytest.mark.parametrize("further", [b"\r\n", b"\r\n\r\n"])
def test_empty_line_after_a_body_is_ignored(short_timeouts: Service, further: bytes) -> None:
    with connection(short_timeouts) as client:
        client.sendall((request(BODY) + further) * 2 + request(BODY, b"Connection: close") + further)
        assert read_to_end(client).count(b"HTTP/1.1 200") == 3


@pytest.mark.parametrize("target", ["http://example.org/livez", "HTTP://[::1]:80/livez?x"])
def test_absolute_request_target_is_accepted(short_timeouts: Service, target: str) -> None:
    with connection(short_timeouts) as client:
        client.sendall(f"GET {target} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
        assert read_to_end(client).startswith(b"HTTP/1.1 200")


def test_http2_preface_gets_one_malformed_request_response(short_timeouts: Service) -> None:
    with connection(short_timeouts) as client:
        client.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        response = read_to_end(client)
    assert response.count(b"HTTP/1.1 ") == 1
    assert problem_in(response)["code"] == "malformed_request"


def test_content_length_00_is_accepted_and_the_next_request_answered(short_timeouts: Service) -> None:
    with connection(short_timeouts) as client:
        get = b"GET /livez HTTP/1.1\r\nHost: a\r\nContent-Length: 00\r\n"
        client.sendall(get + b"\r\n" + get + b"Connection: close\r\n\r\n")
        assert read_to_end(client).count(b"HTTP/1.1 200") == 2


def test_client_that_pipelines_too_much_is_rejected_and_frees_its_rows(short_timeouts: Service) -> None:
    short_timeouts.wait_until_idle()
    before = short_timeouts.metrics().value("cancelled_total", stage="running")
    with connection(short_timeouts) as client:
        client.sendall(request(LONG))
        short_timeouts.wait_until_running()
        client.sendall(request(BODY) * 1000)
        assert problem_in(read_to_end(client))["code"] == "malformed_request"
    short_timeouts.wait_until_idle()
    assert short_timeouts.metrics().value("cancelled_total", stage="running") - before == 64


MALFORMED = {
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200) + b"\r\n\r\n",
    "no-method": b"\r\n\r\n\x00\x01\r\n\r\n",
    "http2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no-version": b"GET /\r\n\r\n",
    "two-lengths": HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
    "length-and-encoding": HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "encoding-in-http-1.0": b"POST /generate HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "bad-length": HEAD + b"Content-Length: -1\r\n\r\n",
    "bad-chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "nul-in-header": b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: \x00\r\n\r\n",
    "no-host": b"GET /health HTTP/1.1\r\n\r\n",
    "bare-cr": b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: a\rb\r\n\r\n",
    "tiny-chunks": CHUNKED + b"1\r\n \r\n" * 2000 + b"0\r\n\r\n",
    "a-megabyte-of-tiny-chunks": CHUNKED + b"1\r\n \r\n" * 175_000,
    "long-chunk-extension": CHUNKED + b"1;" + b"a" * 2000 + b"\r\n",
    "expecting-100": HEAD + b"Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
}
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n"
TOO_LARGE = {
    "long-header": GET + b"X-A: " + b"a" * 9000 + b"\r\n\r\n",
    "long-folded-header": GET + b"X-A: a" + b"\r\n a" * 3000 + b"\r\n\r\n",
    "long-head": GET + b"X-A: " + b"a" * 200_000 + b"\r\n\r\n",
    "long-head-of-short-lines": GET + (b"X-A: " + b"a" * 1000 + b"\r\n") * 40 + b"\r\n",
    "many-headers": GET + b"X: y\r\n" * 200_000 + b"\r\n",
    "long-path": b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "long-trailers": CHUNKED + b"0\r\n" + (b"X-A: " + b"a" * 1000 + b"\r\n") * 40 + b"\r\n",
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_malformed_http_is_a_problem_document_with_status_400(short_timeouts: Service, data: bytes) -> None:
    assert status_and_code(short_timeouts, data) == (400, "malformed_request")


@pytest.mark.parametrize("head", TOO_LARGE.values(), ids=TOO_LARGE)
def test_headers_over_the_limits_are_431(short_timeouts: Service, head: bytes) -> None:
    assert status_and_code(short_timeouts, head) == (431, "headers_too_large")


def status_and_code(service: Service, request: bytes) -> tuple[int, str]:
    """Sends a whole request and returns the status and code of the problem document."""
    with connection(service) as client:
        client.sendall(request)
        problem = problem_in(read_to_end(client))
    assert service.client.get("/health").status_code == 200
    return problem["status"], problem["code"]


def test_headers_just_below_the_limits_are_accepted(short_timeouts: Service) -> None:
    """Sends headers of the largest size, as many as the total limit allows, and a body in the same write."""
    lines = [b"X-A: " + b"a" * (8192 - 5)] * 3 + [b"X-A: " + b"a" * 7000, b"Connection: close"]
    with connection(short_timeouts) as client:
        client.sendall(request(BODY, *lines) + b" " * 40_000)
        assert read_to_end(client).startswith(b"HTTP/1.1 200")


def test_second_head_on_a_connection_has_the_same_limit(short_timeouts: Service) -> None:
    with connection(short_timeouts) as client:
        client.sendall(request(BODY) + GET + b"X-A: " + b"a" * 9000 + b"\r\n\r\n")
        responses = read_to_end(client)
    assert responses.startswith(b"HTTP/1.1 200")
    assert problem_in(responses)["code"] == "headers_too_large"


def test_body_with_broken_framing_is_counted_and_logged_as_one_request(short_timeouts: Service) -> None:
    before = short_timeouts.metrics()
    with connection(short_timeouts) as client:
        client.sendall(HEAD + b"X-Request-ID: broken\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n")
        response = read_to_end(client)
    assert problem_in(response)["request_id"] == "broken"
    assert b"x-content-type-options: nosniff" in response.lower()
    wait_until(lambda: any("broken" in line for line in short_timeouts.process.lines), "the request is logged")
    (line,) = [json.loads(line) for line in short_timeouts.process.lines if '"broken"' in line]
    assert (line["status"], line["outcome"]) == (400, "malformed_request")
    after = short_timeouts.metrics()
    for route, count in (("/generate", 1), ("other", 0)):
        labels = {"route": route, "code": "400"}
        assert after.value("requests_total", **labels) - before.value("requests_total", **labels) == count


def test_service_answers_while_a_thousand_connections_are_idle(short_timeouts: Service) -> None:
    before = descriptors(short_timeouts)
    with ExitStack() as stack:
        clients = [stack.enter_context(connection(short_timeouts)) for _ in range(1000)]
        assert short_timeouts.client.get("/health").status_code == 200
        assert short_timeouts.images(digit=7, num_steps=1, seed=1) == short_timeouts.images(
            digit=7, num_steps=1, seed=1
        )
        assert all(read_to_end(client) == b"" for client in clients)  # the read timeout closed all of them
    wait_until(lambda: descriptors(short_timeouts) <= before + 1, "all descriptors are closed")


def test_pipelined_requests_are_all_answered(short_timeouts: Service) -> None:
    with connection(short_timeouts) as client:
        client.sendall(request(BODY) * 4 + request(BODY, b"Connection: close"))
        assert read_to_end(client).count(b"HTTP/1.1 200") == 5


def test_keep_alive_connection_may_idle_longer_than_the_read_timeout(short_timeouts: Service) -> None:
    with connection(short_timeouts) as client:
        client.sendall(request(BODY))
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
        time.sleep(1.5 * READ_TIMEOUT)
        client.sendall(request(BODY, b"Connection: close"))
        assert b"HTTP/1.1 200" in read_to_end(client)
