"""Connections that are slow, silent, half closed or no HTTP: each has its end, and costs nobody else anything."""

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
from tests.e2e.process import PATIENCE, eventually
from tests.e2e.service import Service

BODY = json.dumps({"digit": 7, "num_steps": 1, "seed": 1}).encode()
LONG = json.dumps({"digit": 7, "count": 64, "seed": 1}).encode()
HEAD = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
READ_TIMEOUT, WRITE_TIMEOUT = 0.5, 1.0
MORE_THAN_A_KERNEL_TAKES = 100  # answers of 150 kB for a client that does not read them


@pytest.fixture(scope="module")
def impatient(checkpoint: Path) -> Iterator[Service]:
    """A service that waits half a second for a head or a body, and a second for a reader."""
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
    """A bare one."""
    with socket.socket() as client:
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(PATIENCE)
        client.connect(service.address)
        yield client


def request(body: bytes, *more: bytes) -> bytes:
    return HEAD + b"".join(line + b"\r\n" for line in more) + b"Content-Length: %d\r\n\r\n" % len(body) + body


def read_to_end(client: socket.socket) -> bytes:
    """All until the server closes; a reset after the last byte is an end, too."""
    received = b""
    with suppress(ConnectionResetError):
        while piece := client.recv(65536):
            received += piece
    return received


def problem_in(answer: bytes) -> dict[str, Any]:
    """The document of the last answer; its id is in the head as well."""
    head, _, body = answer[answer.rindex(b"HTTP/1.1") :].partition(b"\r\n\r\n")
    assert b"application/problem+json" in head
    assert b"connection: close" in head.lower()
    problem: dict[str, Any] = json.loads(body)
    assert problem["request_id"].encode() in head
    return problem


def descriptors(service: Service) -> int:
    return psutil.Process(service.process.pid).num_fds()


def test_a_connection_that_says_nothing_is_closed(impatient: Service) -> None:
    with connection(impatient) as client:
        assert read_to_end(client) == b""


@pytest.mark.parametrize(
    "head", [b"P", b"POST /generate HTTP/1.1\r\n", HEAD], ids=["one-byte", "one-line", "all-but-end"]
)
def test_a_head_that_does_not_end_is_408(impatient: Service, head: bytes) -> None:
    with connection(impatient) as client:
        client.sendall(head)
        problem = problem_in(read_to_end(client))
    assert (problem["status"], problem["code"]) == (408, "request_timeout")


def test_a_head_that_drips_has_no_more_time_than_one_that_stops(impatient: Service) -> None:
    """Slowloris: a byte now and then."""
    with connection(impatient) as client:
        client.settimeout(READ_TIMEOUT / 5)
        received, sent = b"", 0
        while b"}" not in received:
            assert sent < 500, "the server waits for ever"
            try:
                client.sendall(HEAD[:1] if not sent else b"A")
                sent += 1
                received += client.recv(65536)
            except TimeoutError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                break
    assert problem_in(received)["code"] == "request_timeout"


def test_a_second_head_on_the_same_connection_has_its_time_too(impatient: Service) -> None:
    with connection(impatient) as client:
        client.sendall(request(BODY))
        first = client.recv(65536)
        assert first.startswith(b"HTTP/1.1 200")
        client.sendall(b"POST /gen")
        assert problem_in(read_to_end(client))["code"] == "request_timeout"


def test_a_body_that_does_not_arrive_is_408(impatient: Service) -> None:
    with connection(impatient) as client:
        client.sendall(HEAD + b"Content-Length: 1000\r\n\r\n{")
        answer = read_to_end(client)
    assert problem_in(answer)["code"] == "request_timeout"
    assert b"HTTP/1.1 408" in answer


def test_work_may_take_longer_than_reading(impatient: Service) -> None:
    body = json.dumps({"digit": 7, "count": 64, "seed": 1, "scale": 2}).encode()
    with connection(impatient) as client:
        client.sendall(request(body, b"Connection: close"))
        assert read_to_end(client).startswith(b"HTTP/1.1 200")


def test_a_client_that_does_not_read_is_disconnected(impatient: Service) -> None:
    impatient.wait_until_idle()
    before = descriptors(impatient)
    body = json.dumps({"digit": 7, "count": 64, "num_steps": 1, "scale": 16}).encode()
    with connection(impatient, receive_buffer=4096) as client:
        client.sendall(request(body) * MORE_THAN_A_KERNEL_TAKES)
        eventually(lambda: descriptors(impatient) > before, "it is connected")
        eventually(lambda: descriptors(impatient) <= before, "it is disconnected")
        assert 0 < read_to_end(client).count(b"HTTP/1.1 200") < MORE_THAN_A_KERNEL_TAKES
    impatient.wait_until_idle()


def test_a_stream_that_nobody_reads_is_ended(impatient: Service) -> None:
    head = b"POST /generate?previews=100 HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    more = b"Accept: text/event-stream\r\nX-Request-ID: unread\r\nContent-Length: %d\r\n\r\n" % len(LONG)
    with connection(impatient, receive_buffer=4096) as client:
        client.sendall(head + more + LONG)
        eventually(lambda: any("unread" in line for line in impatient.process.lines), "its line is in the log")
    (line,) = [json.loads(line) for line in impatient.process.lines if "unread" in line]
    assert (line["status"], line["outcome"]) == (200, "client_gone")
    impatient.wait_until_idle()


# Its previews, 6 MB, are more than a kernel takes for a client that does not read.
LARGE = {"digit": 6, "count": 64, "seed": 1, "num_steps": 80, "guidance_scale": 1}


def stream(client: socket.socket, body: dict[str, Any]) -> None:
    """Asks for a stream and reads nothing of it."""
    content = json.dumps(body).encode()
    head = HEAD.replace(b"/generate", b"/generate?previews=80")
    more = b"Accept: text/event-stream\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(content)
    client.sendall(head + more + content)


def events_in(answer: bytes) -> list[tuple[str, dict[str, Any]]]:
    """Name and data of each event; no chunk of the body ends within an event."""
    lines = answer.decode().split("\r\n")
    events = [line for line in lines if line.startswith("event: ")]
    return [(name[7:], json.loads(data[6:])) for name, data, *_ in (event.split("\n") for event in events)]


def test_stream_that_is_read_slowly_is_whole_if_its_images_were_in_time(service: Service) -> None:
    timeout = 3 + 3 * service.post(LARGE).json()["timing"]["total_seconds"]
    drawn = service.metrics().of("images_total", digit="6")
    with connection(service, receive_buffer=4096) as client:
        start = time.monotonic()
        stream(client, {**LARGE, "timeout_seconds": timeout})
        service.wait_for(drawn + 64, "images_total", digit="6")
        assert time.monotonic() - start < timeout, "this machine cannot draw it in time"
        time.sleep(start + timeout + 0.5 - time.monotonic())  # the deadline passes while nothing is read
        names = [name for name, _ in events_in(read_to_end(client))]
    assert names.count("image") == 64
    assert (names[0], names[-1]) == ("accepted", "done")


def test_stream_that_is_read_slowly_ends_with_an_error_if_its_images_were_late(service: Service) -> None:
    late = service.metrics().of("rejected_total", reason="deadline")
    with connection(service, receive_buffer=4096) as client:
        stream(client, {**LARGE, "timeout_seconds": 0.2})
        service.wait_until_idle()
        events = events_in(read_to_end(client))
    assert events[-1][0] == "error"
    assert events[-1][1]["code"] == "deadline_exceeded"
    assert "done" not in [name for name, _ in events]
    service.wait_for(late + 1, "rejected_total", reason="deadline")


def test_a_client_that_closes_its_side_has_left(impatient: Service) -> None:
    impatient.wait_until_idle()
    before = impatient.metrics().of("cancelled_total", stage="running")
    with connection(impatient) as client:
        client.sendall(request(LONG))
        impatient.wait_until_running()
        client.shutdown(socket.SHUT_WR)
        assert read_to_end(client) == b""
    impatient.wait_until_idle()
    assert impatient.metrics().of("cancelled_total", stage="running") > before


def test_a_client_that_resets_the_connection_has_left(impatient: Service) -> None:
    impatient.wait_until_idle()
    with connection(impatient) as client:
        client.sendall(request(LONG))
        impatient.wait_until_running()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    impatient.wait_until_idle()


FURTHER_BYTES = {
    "an empty line": b"\r\n",
    "a byte": b"x",
    "a second request": request(BODY),
    "two pieces": b"\r\n" + request(BODY),
}


@pytest.mark.parametrize("resets", [False, True], ids=["close", "reset"])
@pytest.mark.parametrize("header", [b"X: y", b"Accept: text/event-stream", b"Connection: close", b"Upgrade: h2c"])
@pytest.mark.parametrize("further", FURTHER_BYTES.values(), ids=FURTHER_BYTES)
def test_client_that_sends_more_and_leaves_frees_its_rows(
    impatient: Service, further: bytes, header: bytes, resets: bool
) -> None:
    impatient.wait_until_idle()
    before = impatient.metrics()
    with connection(impatient) as client:
        client.sendall(request(LONG, header))
        impatient.wait_until_running()
        for i in range(2):  # in two reads
            client.sendall(further[i * len(further) // 2 : (i + 1) * len(further) // 2])
            assert impatient.client.get("/livez").status_code == 200
        if resets:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    impatient.wait_until_idle()
    after = impatient.metrics()
    assert after.of("cancelled_total", stage="running") - before.of("cancelled_total", stage="running") == 64
    assert after.of("images_total", digit="7") == before.of("images_total", digit="7")


@pytest.mark.parametrize("further", [b"\r\n", b"\r\n\r\n"])
def test_empty_line_after_a_body_is_ignored(impatient: Service, further: bytes) -> None:
    with connection(impatient) as client:
        client.sendall((request(BODY) + further) * 2 + request(BODY, b"Connection: close") + further)
        assert read_to_end(client).count(b"HTTP/1.1 200") == 3


@pytest.mark.parametrize("target", ["http://example.org/livez", "HTTP://[::1]:80/livez?x"])
def test_absolute_target_is_answered(impatient: Service, target: str) -> None:
    with connection(impatient) as client:
        client.sendall(f"GET {target} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
        assert read_to_end(client).startswith(b"HTTP/1.1 200")


def test_start_of_http_2_is_refused_once(impatient: Service) -> None:
    with connection(impatient) as client:
        client.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        answer = read_to_end(client)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert problem_in(answer)["code"] == "malformed_request"


def test_requests_after_a_length_of_many_zeros_are_answered(impatient: Service) -> None:
    with connection(impatient) as client:
        get = b"GET /livez HTTP/1.1\r\nHost: a\r\nContent-Length: 00\r\n"
        client.sendall(get + b"\r\n" + get + b"Connection: close\r\n\r\n")
        assert read_to_end(client).count(b"HTTP/1.1 200") == 2


def test_client_that_sends_without_end_before_its_answer_is_refused(impatient: Service) -> None:
    impatient.wait_until_idle()
    before = impatient.metrics().of("cancelled_total", stage="running")
    with connection(impatient) as client:
        client.sendall(request(LONG))
        impatient.wait_until_running()
        client.sendall(request(BODY) * 1000)
        assert problem_in(read_to_end(client))["code"] == "malformed_request"
    impatient.wait_until_idle()
    assert impatient.metrics().of("cancelled_total", stage="running") - before == 64


GARBAGE = {
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


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_what_is_not_http_is_a_problem_like_any_other(impatient: Service, garbage: bytes) -> None:
    assert refused(impatient, garbage) == (400, "malformed_request")


@pytest.mark.parametrize("head", TOO_LARGE.values(), ids=TOO_LARGE)
def test_headers_over_the_limit_are_431(impatient: Service, head: bytes) -> None:
    assert refused(impatient, head) == (431, "headers_too_large")


def refused(service: Service, request: bytes) -> tuple[int, str]:
    """What a client reads after it has sent everything."""
    with connection(service) as client:
        client.sendall(request)
        problem = problem_in(read_to_end(client))
    assert service.client.get("/health").status_code == 200
    return problem["status"], problem["code"]


def test_headers_within_the_limits_are_read(impatient: Service) -> None:
    """The largest header, as many as fit in a head, and a body in the same piece."""
    lines = [b"X-A: " + b"a" * (8192 - 5)] * 3 + [b"X-A: " + b"a" * 7000, b"Connection: close"]
    with connection(impatient) as client:
        client.sendall(request(BODY, *lines) + b" " * 40_000)
        assert read_to_end(client).startswith(b"HTTP/1.1 200")


def test_second_head_has_the_same_limit(impatient: Service) -> None:
    with connection(impatient) as client:
        client.sendall(request(BODY) + GET + b"X-A: " + b"a" * 9000 + b"\r\n\r\n")
        answers = read_to_end(client)
    assert answers.startswith(b"HTTP/1.1 200")
    assert problem_in(answers)["code"] == "headers_too_large"


def test_a_body_whose_framing_is_broken_is_one_request_with_one_id(impatient: Service) -> None:
    before = impatient.metrics()
    with connection(impatient) as client:
        client.sendall(HEAD + b"X-Request-ID: broken\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n")
        answer = read_to_end(client)
    assert problem_in(answer)["request_id"] == "broken"
    assert b"x-content-type-options: nosniff" in answer.lower()
    eventually(lambda: any("broken" in line for line in impatient.process.lines), "its line is in the log")
    (line,) = [json.loads(line) for line in impatient.process.lines if '"broken"' in line]
    assert (line["status"], line["outcome"]) == (400, "malformed_request")
    after = impatient.metrics()
    for route, count in (("/generate", 1), ("other", 0)):
        labels = {"route": route, "code": "400"}
        assert after.of("requests_total", **labels) - before.of("requests_total", **labels) == count


def test_a_thousand_idle_connections_are_in_nobodys_way(impatient: Service) -> None:
    before = descriptors(impatient)
    with ExitStack() as stack:
        clients = [stack.enter_context(connection(impatient)) for _ in range(1000)]
        assert impatient.client.get("/health").status_code == 200
        assert impatient.images(digit=7, num_steps=1, seed=1) == impatient.images(digit=7, num_steps=1, seed=1)
        assert all(read_to_end(client) == b"" for client in clients)  # all were given up
    eventually(lambda: descriptors(impatient) <= before + 1, "all descriptors are free again")


def test_requests_one_behind_the_other_are_all_answered(impatient: Service) -> None:
    with connection(impatient) as client:
        client.sendall(request(BODY) * 4 + request(BODY, b"Connection: close"))
        assert read_to_end(client).count(b"HTTP/1.1 200") == 5


def test_the_time_is_on_no_ones_side_who_waits(impatient: Service) -> None:
    """A keep-alive connection rests longer than a head may take."""
    with connection(impatient) as client:
        client.sendall(request(BODY))
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
        time.sleep(1.5 * READ_TIMEOUT)
        client.sendall(request(BODY, b"Connection: close"))
        assert b"HTTP/1.1 200" in read_to_end(client)
