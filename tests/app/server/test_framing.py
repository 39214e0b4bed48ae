import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import h11
import pytest

from app.errors import HeadersTooLarge, MalformedRequest, UnfogError
from app.server.framing import (
    MAX_CHUNK_LINE_BYTES,
    MAX_HEAD_BYTES,
    MAX_HEADER_BYTES,
    MAX_LINES,
    MAX_SMALL_CHUNKS,
    SMALL_CHUNK_BYTES,
    LimitedConnection,
    RefusedError,
)

MAX_AHEAD = 1000
HEAD_START = b"GET / HTTP/1.1\r\nHost: x\r\n"
CHUNKED = HEAD_START + b"Transfer-Encoding: chunked\r\n\r\n"
SLICES = [1, 7, 4096, 10**7]  # bytes per read; the limits must not depend on it


def parse(data: bytes, slice_bytes: int = 10**7) -> Iterator[h11.Event]:
    """Yields the events of a connection whose requests are not answered."""
    connection = LimitedConnection(MAX_AHEAD)
    for i in range(0, len(data), slice_bytes):
        connection.receive_data(data[i : i + slice_bytes])
        yield from next_events(connection)


def next_events(connection: LimitedConnection) -> Iterator[h11.Event]:
    while (event := connection.next_event()) is not h11.NEED_DATA:
        assert isinstance(event, h11.Event)
        yield event


def refusal(data: bytes, slice_bytes: int = 10**7) -> UnfogError:
    """Returns the error with which the connection rejects these bytes."""
    connection = LimitedConnection(MAX_AHEAD)
    with pytest.raises(h11.RemoteProtocolError):
        for i in range(0, len(data), slice_bytes):
            connection.receive_data(data[i : i + slice_bytes])
            list(next_events(connection))
    return connection.refusal


def names(data: bytes, slice_bytes: int = 10**7) -> list[str]:
    return [type(event).__name__ for event in parse(data, slice_bytes)]


def body(data: bytes, slice_bytes: int = 10**7) -> bytes:
    return b"".join(event.data for event in parse(data, slice_bytes) if isinstance(event, h11.Data))


def head_of_size(num_bytes: int) -> bytes:
    """Returns a head with this number of bytes."""
    head, line = HEAD_START, b"X: " + b"a" * (MAX_HEADER_BYTES // 2) + b"\r\n"
    while len(head) + len(line) + 10 < num_bytes:
        head += line
    return head + b"X: " + b"a" * (num_bytes - len(head) - 7) + b"\r\n\r\n"


@pytest.mark.parametrize("slice_bytes", SLICES)
def test_head_of_the_maximum_size_is_parsed_and_a_larger_head_is_rejected(slice_bytes: int) -> None:
    assert len(head_of_size(MAX_HEAD_BYTES)) == MAX_HEAD_BYTES
    assert names(head_of_size(MAX_HEAD_BYTES), slice_bytes) == ["Request", "EndOfMessage"]
    assert isinstance(refusal(head_of_size(MAX_HEAD_BYTES + 1), slice_bytes), HeadersTooLarge)


@pytest.mark.parametrize("slice_bytes", SLICES)
@pytest.mark.parametrize("line_end", [b"\r\n", b"\n"])
def test_header_of_the_maximum_size_is_parsed_and_a_larger_header_is_rejected(
    slice_bytes: int, line_end: bytes
) -> None:
    header = b"X: ".ljust(MAX_HEADER_BYTES, b"a")
    assert names(HEAD_START + header + line_end * 2, slice_bytes) == ["Request", "EndOfMessage"]
    assert isinstance(refusal(HEAD_START + header + b"a" + line_end * 2, slice_bytes), HeadersTooLarge)


@pytest.mark.parametrize("slice_bytes", SLICES)
@pytest.mark.parametrize("fold", [b"\r\n ", b"\n\t"])
def test_size_of_a_header_includes_its_continuation_lines(slice_bytes: int, fold: bytes) -> None:
    half = b"a" * (MAX_HEADER_BYTES // 2 - 10)
    assert names(HEAD_START + b"X: " + half + fold + half + b"\r\n\r\n", slice_bytes) == ["Request", "EndOfMessage"]
    assert isinstance(refusal(HEAD_START + b"X: " + half + fold + half + fold + half, slice_bytes), HeadersTooLarge)


@pytest.mark.parametrize("slice_bytes", SLICES)
def test_long_request_line_is_rejected(slice_bytes: int) -> None:
    assert isinstance(refusal(b"GET /" + b"a" * MAX_HEADER_BYTES, slice_bytes), HeadersTooLarge)


def test_incomplete_head_is_rejected_at_the_limit() -> None:
    line = b"X: " + b"a" * 1000 + b"\r\n"
    assert isinstance(refusal(HEAD_START + line * 40), HeadersTooLarge)
    assert names(HEAD_START + line * 30) == []


@pytest.mark.parametrize("slice_bytes", SLICES)
def test_too_many_small_headers_are_rejected(slice_bytes: int) -> None:
    assert names(HEAD_START + b"a:\n" * (MAX_LINES - 2) + b"\n", slice_bytes) == ["Request", "EndOfMessage"]
    assert isinstance(refusal(HEAD_START + b"a:\n" * (MAX_LINES - 1) + b"\n", slice_bytes), HeadersTooLarge)


@pytest.mark.parametrize("slice_bytes", SLICES)
def test_body_in_the_same_read_does_not_count_as_head(slice_bytes: int) -> None:
    content = b"b" * 40_000
    head = head_of_size(MAX_HEAD_BYTES - 100)[:-2] + b"Content-Length: %d\r\n\r\n" % len(content)
    assert body(head + content, slice_bytes) == content
    chunks = (
        head_of_size(MAX_HEAD_BYTES - 100)[:-2]
        + b"Transfer-Encoding: chunked\r\n\r\n9c40\r\n"
        + content
        + b"\r\n0\r\n\r\n"
    )
    assert body(chunks, slice_bytes) == content


def test_limit_applies_to_each_request_of_a_connection() -> None:
    connection = LimitedConnection(10 * MAX_HEAD_BYTES)
    connection.receive_data(head_of_size(MAX_HEAD_BYTES) * 3 + head_of_size(MAX_HEAD_BYTES + 1))
    for _ in range(3):
        assert [type(event) for event in next_events(connection)] == [h11.Request, h11.EndOfMessage]
        answer(connection)
    with pytest.raises(RefusedError):
        connection.next_event()


def answer(connection: LimitedConnection) -> None:
    connection.send(h11.Response(status_code=200, headers=[("Content-Length", "0")]))
    connection.send(h11.EndOfMessage())
    connection.start_next_cycle()


@pytest.mark.parametrize("after", [b"\r\n", b"\r\n\r\n"])
@pytest.mark.parametrize("first", [HEAD_START + b"\r\n", CHUNKED + b"1\r\na\r\n0\r\n\r\n"], ids=["sized", "chunked"])
def test_empty_lines_between_requests_are_skipped(first: bytes, after: bytes) -> None:
    connection = LimitedConnection(MAX_AHEAD)
    connection.receive_data(first + after + HEAD_START)
    assert [type(event) for event in next_events(connection)][-1] is h11.EndOfMessage
    answer(connection)
    assert list(next_events(connection)) == []
    assert connection.has_part_of_head
    connection.receive_data(b"\r\n")
    assert [type(event) for event in next_events(connection)] == [h11.Request, h11.EndOfMessage]
    assert not connection.has_part_of_head


@pytest.mark.parametrize("after", [b"\r\n", b"\r\n\r\n"])
def test_empty_lines_that_arrive_byte_by_byte_are_skipped(after: bytes) -> None:
    connection = LimitedConnection(MAX_AHEAD)
    connection.receive_data(HEAD_START + b"\r\n")
    assert [type(event) for event in next_events(connection)] == [h11.Request, h11.EndOfMessage]
    answer(connection)
    found = []
    for byte in after + HEAD_START + b"\r\n":
        connection.receive_data(bytes([byte]))
        found += [type(event) for event in next_events(connection)]
    assert found == [h11.Request, h11.EndOfMessage]


@pytest.mark.parametrize("start", [b"\x16\x03\x01", b"\r\r", b" GET", b"\nGET", b"\x00"])
def test_first_byte_that_cannot_start_a_method_is_rejected(start: bytes) -> None:
    assert isinstance(refusal(start), MalformedRequest)


@pytest.mark.parametrize("header", [b"X: a\x00", b"X: a\rb", b"X: a\x0b", b"X: a\x0c", b"X : a", b" X: a"])
def test_malformed_header_is_rejected(header: bytes) -> None:
    assert isinstance(refusal(b"GET / HTTP/1.1\r\n" + header + b"\r\nHost: x\r\n\r\n"), MalformedRequest)


AMBIGUOUS_FRAMING = {
    "length and encoding": b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "encoding and length": b"transfer-encoding: Chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n",
    "no length and encoding": b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths": b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
    "two lengths in one header": b"Content-Length: 1, 2\r\n\r\n{}",
    "two encodings": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "another encoding": b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("framing", AMBIGUOUS_FRAMING.values(), ids=AMBIGUOUS_FRAMING)
def test_request_with_ambiguous_framing_is_rejected(framing: bytes) -> None:
    assert isinstance(refusal(HEAD_START + framing), MalformedRequest)


def test_transfer_encoding_of_http_1_0_is_rejected() -> None:
    old = b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    assert isinstance(refusal(old), MalformedRequest)


@pytest.mark.parametrize("version", [b"2.0", b"0.9", b"9.9"])
def test_other_http_versions_are_rejected(version: bytes) -> None:
    assert "HTTP version" in str(refusal(b"PRI * HTTP/%b\r\nHost: a\r\n\r\n" % version))


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (b"http://a:80/livez", b"/livez"),
        (b"HTTPS://[::1]/health?x=/y", b"/health?x=/y"),
        (b"http://a", b"/"),
        (b"http://a?x", b"/?x"),
        (b"/http://a/livez", b"/http://a/livez"),
        (b"*", b"*"),
    ],
)
def test_absolute_target_is_reduced_to_its_path(target: bytes, path: bytes) -> None:
    request = next(parse(b"GET %b HTTP/1.1\r\nHost: a\r\n\r\n" % target))
    assert isinstance(request, h11.Request)
    assert (request.target, request.method, request.headers.raw_items()) == (path, b"GET", [(b"Host", b"a")])


def test_two_equal_content_lengths_are_accepted() -> None:
    assert body(HEAD_START + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}") == b"{}"


@pytest.mark.parametrize("slice_bytes", SLICES)
def test_too_many_small_chunks_are_rejected(slice_bytes: int) -> None:
    chunk = b"1\r\na\r\n"
    assert body(CHUNKED + chunk * MAX_SMALL_CHUNKS + b"0\r\n\r\n", slice_bytes) == b"a" * MAX_SMALL_CHUNKS
    many = CHUNKED + chunk * (MAX_SMALL_CHUNKS + 1)
    assert isinstance(refusal(many + b"0\r\n\r\n", slice_bytes), MalformedRequest)
    assert isinstance(refusal(many + chunk, slice_bytes), MalformedRequest)  # The body is incomplete.


@pytest.mark.parametrize("slice_bytes", SLICES)
def test_any_number_of_large_chunks_is_accepted(slice_bytes: int) -> None:
    data = b"a" * SMALL_CHUNK_BYTES
    chunk = b"%x\r\n%b\r\n" % (len(data), data)
    count = MAX_SMALL_CHUNKS + 10
    assert body(CHUNKED + chunk * count + b"0\r\n\r\n", slice_bytes) == data * count


def test_average_chunk_size_includes_large_chunks() -> None:
    large = b"400\r\n" + b"a" * 1024 + b"\r\n"
    small = b"1\r\na\r\n"
    assert body(CHUNKED + large * 200 + small * 1000 + b"0\r\n\r\n")
    assert isinstance(refusal(CHUNKED + large * 4 + small * 1000), MalformedRequest)


def test_chunk_is_counted_only_after_it_has_arrived() -> None:
    assert isinstance(refusal(CHUNKED + b"1\r\na\r\n" * 1001 + b"fffffff\r\n"), MalformedRequest)


@pytest.mark.parametrize("slice_bytes", SLICES)
def test_chunk_extension_is_ignored_and_a_long_one_is_rejected(slice_bytes: int) -> None:
    line = b"1;" + b"a" * (MAX_CHUNK_LINE_BYTES - 4) + b"\r\n"
    assert body(CHUNKED + line + b"a\r\n0;x=y\r\n\r\n", slice_bytes) == b"a"
    assert isinstance(refusal(CHUNKED + line[:3] + line[2:] + b"a\r\n", slice_bytes), MalformedRequest)


@pytest.mark.parametrize("line", [b"zz", b"-1", b"0x5", b"", b"1;a\n", b"1;a\rb", b"1;\x00", b"1 a", b"f" * 21, b"1_0"])
def test_malformed_chunk_line_is_rejected(line: bytes) -> None:
    assert isinstance(refusal(CHUNKED + line + b"\r\n" + b"a" * 300), MalformedRequest)


def test_chunk_longer_than_its_size_line_is_rejected() -> None:
    assert isinstance(refusal(CHUNKED + b"1\r\nab\r\n"), MalformedRequest)


@pytest.mark.parametrize("slice_bytes", SLICES)
def test_trailers_have_the_limits_of_headers(slice_bytes: int) -> None:
    trailers = head_of_size(MAX_HEAD_BYTES)[len(b"GET / HTTP/1.1\r\n") :]
    assert names(CHUNKED + b"0\r\n" + trailers, slice_bytes) == ["Request", "EndOfMessage"]
    assert isinstance(refusal(CHUNKED + b"0\r\n" + b"a:\n" * 2000, slice_bytes), HeadersTooLarge)
    assert isinstance(refusal(CHUNKED + b"0\r\nX: " + b"a" * MAX_HEADER_BYTES, slice_bytes), HeadersTooLarge)
    assert isinstance(refusal(CHUNKED + b"0\r\n" + (b"X: " + b"a" * 1000 + b"\r\n") * 40, slice_bytes), HeadersTooLarge)


@pytest.mark.parametrize("slice_bytes", SLICES)
def test_request_after_trailers_waits_for_the_answer(slice_bytes: int) -> None:
    found = names(CHUNKED + b"2\r\n{}\r\n0\r\nX: y\r\n\r\n" + HEAD_START + b"\r\n", slice_bytes)
    assert [name for name in found if name != "Data"] == ["Request", "EndOfMessage"]


def test_bytes_sent_before_the_answer_do_not_pause_the_connection() -> None:
    for start in (
        HEAD_START + b"\r\n",
        HEAD_START + b"Connection: close\r\n\r\n",
        HEAD_START + b"Upgrade: h2c\r\n\r\n",
    ):
        assert names(start + b"\r\n" + HEAD_START, 1) == ["Request", "EndOfMessage"]


def test_too_many_bytes_sent_before_the_answer_are_rejected() -> None:
    assert names(HEAD_START + b"\r\n" + b"a" * MAX_AHEAD) == ["Request", "EndOfMessage"]
    assert isinstance(refusal(HEAD_START + b"\r\n" + b"a" * (MAX_AHEAD + 1)), MalformedRequest)


@pytest.mark.parametrize("upgrade", [b"", b"Upgrade: h2c\r\nConnection: upgrade\r\n"])
def test_request_sent_before_the_answer_is_parsed_after_it(upgrade: bytes) -> None:
    connection = LimitedConnection(MAX_AHEAD)
    connection.receive_data(HEAD_START + upgrade + b"Content-Length: 1\r\n\r\na" + HEAD_START + b"\r\n")
    assert [type(event) for event in next_events(connection)] == [h11.Request, h11.Data, h11.EndOfMessage]
    answer(connection)
    assert [type(event) for event in next_events(connection)] == [h11.Request, h11.EndOfMessage]


SLOW_INPUTS = {
    "a long header, byte by byte": (HEAD_START + b"X: ", b"a", 1),
    "many headers, byte by byte": (HEAD_START, b"X: y\n", 1),
    "many headers": (HEAD_START, b"X: y\n", 16384),
    "folded lines": (HEAD_START + b"X: a", b"\r\n ", 16384),
    "white space before a control character": (HEAD_START + b"X:", b" ", 16384),
    "white space in a chunk line": (CHUNKED + b"1;", b" ", 16384),
    "small chunks": (CHUNKED, b"1\r\na\r\n", 16384),
    "small chunks, byte by byte": (CHUNKED, b"1\r\na\r\n", 1),
    "chunks": (CHUNKED, b"40\r\n" + b"a" * 64 + b"\r\n", 16384),
    "trailers, byte by byte": (CHUNKED + b"0\r\n", b"X: y\n", 1),
    "line ends": (b"", b"\r\n", 16384),
    "bytes ahead, byte by byte": (HEAD_START + b"\r\n", b"a", 1),
}


class CountingBuffer(bytearray):
    """Counts the bytes that searches and copies look at."""

    num_bytes = 0

    def find(self, sub: Any, start: Any = 0, end: Any = None) -> int:
        end = len(self) if end is None else min(end, len(self))
        found = super().find(sub, start, end)
        self.num_bytes += (end if found < 0 else found) - min(start, end)
        return found

    def __getitem__(self, index: Any) -> Any:
        item = super().__getitem__(index)
        self.num_bytes += len(item) if isinstance(item, bytearray) else 1
        return item


def work_of(data: bytes, slice_bytes: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Returns the number of bytes that are searched, copied or given to h11, and of calls of functions."""
    connection, buffer, work = LimitedConnection(MAX_AHEAD), CountingBuffer(), 0
    connection._unparsed = buffer
    give = h11.Connection.receive_data

    def count_given(self: h11.Connection, given: bytes) -> None:
        nonlocal work
        work += len(given)
        give(self, given)

    def count_call(frame: object, event: str, argument: object) -> None:
        nonlocal work
        work += event in ("call", "c_call")

    with monkeypatch.context() as patch, suppress(h11.RemoteProtocolError):
        patch.setattr(h11.Connection, "receive_data", count_given)
        sys.setprofile(count_call)
        try:
            for i in range(0, len(data), slice_bytes):
                connection.receive_data(data[i : i + slice_bytes])
                list(next_events(connection))
        finally:
            sys.setprofile(None)
    return work + buffer.num_bytes


@pytest.mark.parametrize(("start", "piece", "slice_bytes"), SLOW_INPUTS.values(), ids=SLOW_INPUTS)
@pytest.mark.parametrize("small", [1_000, 100_000])  # number of bytes: one within the limits, one above them
def test_work_of_parsing_grows_linearly_with_the_input(
    start: bytes, piece: bytes, slice_bytes: int, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    least, most = (
        work_of(start + piece * (size // len(piece)) + b"\x00\n\r\n\r\n", slice_bytes, monkeypatch)
        for size in (small, 8 * small)
    )
    assert most < 9 * least


@pytest.mark.parametrize("white_space", [b" ", b"\t", b"\r\n "])
def test_h11_gets_no_header_with_a_control_character(white_space: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its regular expressions take quadratic time on white space before such a character."""
    given = list[bytes]()
    monkeypatch.setattr(h11.Connection, "receive_data", lambda connection, data: given.append(data))
    refused = refusal(HEAD_START + b"X:" + white_space * 500 + b"\x00\n\r\n\r\n")
    assert (type(refused), given) == (MalformedRequest, [])


@pytest.mark.slow
@pytest.mark.parametrize(("start", "piece", "slice_bytes"), SLOW_INPUTS.values(), ids=SLOW_INPUTS)
@pytest.mark.parametrize("small", [1_000, 100_000])
def test_parsing_time_grows_linearly_with_the_input(start: bytes, piece: bytes, slice_bytes: int, small: int) -> None:
    def seconds(size: int) -> float:
        data = start + piece * (size // len(piece)) + b"\x00\n\r\n\r\n"
        begin = time.process_time()
        with suppress(h11.RemoteProtocolError):
            list(parse(data, slice_bytes))
        return time.process_time() - begin

    # Both sizes are measured alternately, so that a slow phase of the machine affects both. The minimum is the value
    # with the least disturbance.
    least, most = zip(*((seconds(small), seconds(8 * small)) for _ in range(9)), strict=True)
    assert min(most) < 12 * min(least) + 0.001


def answer_in_parts(head: h11.Response, *parts: bytes) -> list[bytes]:
    """Returns the bytes that are sent for each event of the answer to GET."""
    connection = LimitedConnection(MAX_AHEAD)
    connection.receive_data(HEAD_START + b"\r\n")
    list(next_events(connection))
    events = [head, *(h11.Data(data=part) for part in parts), h11.EndOfMessage()]
    return [connection.send(event) or b"" for event in events]


def test_head_with_a_length_is_sent_with_the_first_part_of_the_body() -> None:
    head, first, second, end = answer_in_parts(
        h11.Response(status_code=200, headers=[("Content-Length", "6")]), b"abc", b"def"
    )
    assert (head, second, end) == (b"", b"def", b"")
    assert first.startswith(b"HTTP/1.1 200")
    assert first.endswith(b"\r\n\r\nabc")


def test_head_with_a_length_of_zero_is_sent_at_the_end() -> None:
    head, end = answer_in_parts(h11.Response(status_code=200, headers=[("Content-Length", "0")]))
    assert head == b""
    assert end.startswith(b"HTTP/1.1 200")


def test_head_of_a_stream_is_sent_immediately() -> None:
    head, first, _ = answer_in_parts(h11.Response(status_code=200, headers=[]), b"abc")
    assert head.startswith(b"HTTP/1.1 200")
    assert first == b"3\r\nabc\r\n"


def test_h11_is_called_once_for_each_event(monkeypatch: pytest.MonkeyPatch) -> None:
    call, events = h11.Connection.next_event, list[str]()

    def count(connection: h11.Connection) -> object:
        event = call(connection)
        events.append(type(event).__name__)
        return event

    monkeypatch.setattr(h11.Connection, "next_event", count)
    connection, of_one = LimitedConnection(MAX_AHEAD), ["Request", "Data", "EndOfMessage"]
    for number in (1, 2):
        connection.receive_data(HEAD_START + b"Content-Length: 2\r\n\r\n{}")
        assert [type(event).__name__ for event in next_events(connection)] == of_one
        for answer in (h11.Response(status_code=204, headers=[]), h11.EndOfMessage()):
            connection.send(answer)
        connection.start_next_cycle()
        assert list(next_events(connection)) == []
        assert events == number * of_one
