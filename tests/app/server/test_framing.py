import time
from collections.abc import Iterator
from contextlib import suppress

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
START = b"GET / HTTP/1.1\r\nHost: x\r\n"
CHUNKED = START + b"Transfer-Encoding: chunked\r\n\r\n"
SLICES = [1, 7, 4096, 10**7]  # bytes a read: a limit holds however the bytes arrive


def parse(data: bytes, slice_bytes: int = 10**7) -> Iterator[h11.Event]:
    """The events of a connection on which nothing is answered."""
    connection = LimitedConnection(MAX_AHEAD)
    for i in range(0, len(data), slice_bytes):
        connection.receive_data(data[i : i + slice_bytes])
        yield from next_events(connection)


def next_events(connection: LimitedConnection) -> Iterator[h11.Event]:
    while (event := connection.next_event()) is not h11.NEED_DATA:
        assert isinstance(event, h11.Event)
        yield event


def refusal(data: bytes, slice_bytes: int = 10**7) -> UnfogError:
    """What the connection refuses the bytes with."""
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


def filled(num_bytes: int) -> bytes:
    """A head of that size."""
    head, line = START, b"X: " + b"a" * (MAX_HEADER_BYTES // 2) + b"\r\n"
    while len(head) + len(line) + 10 < num_bytes:
        head += line
    return head + b"X: " + b"a" * (num_bytes - len(head) - 7) + b"\r\n\r\n"


@pytest.mark.parametrize("slice_bytes", SLICES)
def test_head_of_the_largest_size_is_parsed_and_a_larger_one_refused(slice_bytes: int) -> None:
    assert len(filled(MAX_HEAD_BYTES)) == MAX_HEAD_BYTES
    assert names(filled(MAX_HEAD_BYTES), slice_bytes) == ["Request", "EndOfMessage"]
    assert isinstance(refusal(filled(MAX_HEAD_BYTES + 1), slice_bytes), HeadersTooLarge)


@pytest.mark.parametrize("slice_bytes", SLICES)
@pytest.mark.parametrize("line_end", [b"\r\n", b"\n"])
def test_header_of_the_largest_size_is_parsed_and_a_larger_one_refused(slice_bytes: int, line_end: bytes) -> None:
    header = b"X: ".ljust(MAX_HEADER_BYTES, b"a")
    assert names(START + header + line_end * 2, slice_bytes) == ["Request", "EndOfMessage"]
    assert isinstance(refusal(START + header + b"a" + line_end * 2, slice_bytes), HeadersTooLarge)


@pytest.mark.parametrize("slice_bytes", SLICES)
@pytest.mark.parametrize("fold", [b"\r\n ", b"\n\t"])
def test_header_over_several_lines_is_counted_as_one(slice_bytes: int, fold: bytes) -> None:
    half = b"a" * (MAX_HEADER_BYTES // 2 - 10)
    assert names(START + b"X: " + half + fold + half + b"\r\n\r\n", slice_bytes) == ["Request", "EndOfMessage"]
    assert isinstance(refusal(START + b"X: " + half + fold + half + fold + half, slice_bytes), HeadersTooLarge)


@pytest.mark.parametrize("slice_bytes", SLICES)
def test_long_request_line_is_refused(slice_bytes: int) -> None:
    assert isinstance(refusal(b"GET /" + b"a" * MAX_HEADER_BYTES, slice_bytes), HeadersTooLarge)


def test_head_that_does_not_end_is_refused_at_the_limit() -> None:
    line = b"X: " + b"a" * 1000 + b"\r\n"
    assert isinstance(refusal(START + line * 40), HeadersTooLarge)
    assert names(START + line * 30) == []


@pytest.mark.parametrize("slice_bytes", SLICES)
def test_many_small_headers_are_refused(slice_bytes: int) -> None:
    assert names(START + b"a:\n" * (MAX_LINES - 2) + b"\n", slice_bytes) == ["Request", "EndOfMessage"]
    assert isinstance(refusal(START + b"a:\n" * (MAX_LINES - 1) + b"\n", slice_bytes), HeadersTooLarge)


@pytest.mark.parametrize("slice_bytes", SLICES)
def test_body_in_the_same_read_does_not_count_as_head(slice_bytes: int) -> None:
    content = b"b" * 40_000
    head = filled(MAX_HEAD_BYTES - 100)[:-2] + b"Content-Length: %d\r\n\r\n" % len(content)
    assert body(head + content, slice_bytes) == content
    chunks = (
        filled(MAX_HEAD_BYTES - 100)[:-2] + b"Transfer-Encoding: chunked\r\n\r\n9c40\r\n" + content + b"\r\n0\r\n\r\n"
    )
    assert body(chunks, slice_bytes) == content


def test_each_request_of_a_connection_has_its_own_limit() -> None:
    connection = LimitedConnection(10 * MAX_HEAD_BYTES)
    connection.receive_data(filled(MAX_HEAD_BYTES) * 3 + filled(MAX_HEAD_BYTES + 1))
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
@pytest.mark.parametrize("first", [START + b"\r\n", CHUNKED + b"1\r\na\r\n0\r\n\r\n"], ids=["sized", "chunked"])
def test_empty_lines_between_requests_are_skipped(first: bytes, after: bytes) -> None:
    connection = LimitedConnection(MAX_AHEAD)
    connection.receive_data(first + after + START)
    assert [type(event) for event in next_events(connection)][-1] is h11.EndOfMessage
    answer(connection)
    assert list(next_events(connection)) == []
    assert connection.has_part_of_head
    connection.receive_data(b"\r\n")
    assert [type(event) for event in next_events(connection)] == [h11.Request, h11.EndOfMessage]
    assert not connection.has_part_of_head


@pytest.mark.parametrize("start", [b"\x16\x03\x01", b"\r\r", b" GET", b"\nGET", b"\x00"])
def test_first_byte_that_begins_no_method_is_refused_at_once(start: bytes) -> None:
    assert isinstance(refusal(start), MalformedRequest)


@pytest.mark.parametrize("header", [b"X: a\x00", b"X: a\rb", b"X: a\x0b", b"X: a\x0c", b"X : a", b" X: a"])
def test_malformed_header_is_refused(header: bytes) -> None:
    assert isinstance(refusal(b"GET / HTTP/1.1\r\n" + header + b"\r\nHost: x\r\n\r\n"), MalformedRequest)


FRAMED_TWICE = {
    "length and encoding": b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "encoding and length": b"transfer-encoding: Chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n",
    "no length and encoding": b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths": b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
    "two lengths in one header": b"Content-Length: 1, 2\r\n\r\n{}",
    "two encodings": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "another encoding": b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("framing", FRAMED_TWICE.values(), ids=FRAMED_TWICE)
def test_request_framed_in_two_ways_is_refused(framing: bytes) -> None:
    assert isinstance(refusal(START + framing), MalformedRequest)


def test_encoding_of_an_old_version_is_refused() -> None:
    old = b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    assert isinstance(refusal(old), MalformedRequest)


@pytest.mark.parametrize("version", [b"2.0", b"0.9", b"9.9"])
def test_other_versions_of_http_are_refused(version: bytes) -> None:
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
def test_an_absolute_target_is_reduced_to_its_path(target: bytes, path: bytes) -> None:
    request = next(parse(b"GET %b HTTP/1.1\r\nHost: a\r\n\r\n" % target))
    assert isinstance(request, h11.Request)
    assert (request.target, request.method, request.headers.raw_items()) == (path, b"GET", [(b"Host", b"a")])


def test_the_same_length_twice_is_one_length() -> None:
    assert body(START + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}") == b"{}"


@pytest.mark.parametrize("slice_bytes", SLICES)
def test_small_chunks_are_refused_past_their_number(slice_bytes: int) -> None:
    chunk = b"1\r\na\r\n"
    assert body(CHUNKED + chunk * MAX_SMALL_CHUNKS + b"0\r\n\r\n", slice_bytes) == b"a" * MAX_SMALL_CHUNKS
    many = CHUNKED + chunk * (MAX_SMALL_CHUNKS + 1)
    assert isinstance(refusal(many + b"0\r\n\r\n", slice_bytes), MalformedRequest)
    assert isinstance(refusal(many + chunk, slice_bytes), MalformedRequest)  # before the body ends


@pytest.mark.parametrize("slice_bytes", SLICES)
def test_large_chunks_are_parsed_whatever_their_number(slice_bytes: int) -> None:
    data = b"a" * SMALL_CHUNK_BYTES
    chunk = b"%x\r\n%b\r\n" % (len(data), data)
    count = MAX_SMALL_CHUNKS + 10
    assert body(CHUNKED + chunk * count + b"0\r\n\r\n", slice_bytes) == data * count


def test_average_counts_large_chunks_too() -> None:
    large = b"400\r\n" + b"a" * 1024 + b"\r\n"
    small = b"1\r\na\r\n"
    assert body(CHUNKED + large * 200 + small * 1000 + b"0\r\n\r\n")
    assert isinstance(refusal(CHUNKED + large * 4 + small * 1000), MalformedRequest)


def test_chunk_that_is_announced_does_not_count_before_it_is_there() -> None:
    assert isinstance(refusal(CHUNKED + b"1\r\na\r\n" * 1001 + b"fffffff\r\n"), MalformedRequest)


@pytest.mark.parametrize("slice_bytes", SLICES)
def test_chunk_extension_is_ignored_and_a_long_one_refused(slice_bytes: int) -> None:
    line = b"1;" + b"a" * (MAX_CHUNK_LINE_BYTES - 4) + b"\r\n"
    assert body(CHUNKED + line + b"a\r\n0;x=y\r\n\r\n", slice_bytes) == b"a"
    assert isinstance(refusal(CHUNKED + line[:3] + line[2:] + b"a\r\n", slice_bytes), MalformedRequest)


@pytest.mark.parametrize("line", [b"zz", b"-1", b"0x5", b"", b"1;a\n", b"1;a\rb", b"1;\x00", b"1 a", b"f" * 21, b"1_0"])
def test_malformed_chunk_line_is_refused(line: bytes) -> None:
    assert isinstance(refusal(CHUNKED + line + b"\r\n" + b"a" * 300), MalformedRequest)


def test_chunk_longer_than_announced_is_refused() -> None:
    assert isinstance(refusal(CHUNKED + b"1\r\nab\r\n"), MalformedRequest)


@pytest.mark.parametrize("slice_bytes", SLICES)
def test_trailers_have_the_limits_of_headers(slice_bytes: int) -> None:
    trailers = filled(MAX_HEAD_BYTES)[len(b"GET / HTTP/1.1\r\n") :]
    assert names(CHUNKED + b"0\r\n" + trailers, slice_bytes) == ["Request", "EndOfMessage"]
    assert isinstance(refusal(CHUNKED + b"0\r\n" + b"a:\n" * 2000, slice_bytes), HeadersTooLarge)
    assert isinstance(refusal(CHUNKED + b"0\r\nX: " + b"a" * MAX_HEADER_BYTES, slice_bytes), HeadersTooLarge)
    assert isinstance(refusal(CHUNKED + b"0\r\n" + (b"X: " + b"a" * 1000 + b"\r\n") * 40, slice_bytes), HeadersTooLarge)


@pytest.mark.parametrize("slice_bytes", SLICES)
def test_request_after_trailers_is_kept_for_its_turn(slice_bytes: int) -> None:
    found = names(CHUNKED + b"2\r\n{}\r\n0\r\nX: y\r\n\r\n" + START + b"\r\n", slice_bytes)
    assert [name for name in found if name != "Data"] == ["Request", "EndOfMessage"]


def test_bytes_sent_ahead_never_pause_the_connection() -> None:
    for start in (START + b"\r\n", START + b"Connection: close\r\n\r\n", START + b"Upgrade: h2c\r\n\r\n"):
        assert names(start + b"\r\n" + START, 1) == ["Request", "EndOfMessage"]


def test_too_many_bytes_sent_ahead_are_refused() -> None:
    assert names(START + b"\r\n" + b"a" * MAX_AHEAD) == ["Request", "EndOfMessage"]
    assert isinstance(refusal(START + b"\r\n" + b"a" * (MAX_AHEAD + 1)), MalformedRequest)


@pytest.mark.parametrize("upgrade", [b"", b"Upgrade: h2c\r\nConnection: upgrade\r\n"])
def test_request_sent_ahead_is_parsed_after_the_answer(upgrade: bytes) -> None:
    connection = LimitedConnection(MAX_AHEAD)
    connection.receive_data(START + upgrade + b"Content-Length: 1\r\n\r\na" + START + b"\r\n")
    assert [type(event) for event in next_events(connection)] == [h11.Request, h11.Data, h11.EndOfMessage]
    answer(connection)
    assert [type(event) for event in next_events(connection)] == [h11.Request, h11.EndOfMessage]


BOMBS = {
    "a long header, byte by byte": (START + b"X: ", b"a", 1),
    "many headers, byte by byte": (START, b"X: y\n", 1),
    "many headers": (START, b"X: y\n", 16384),
    "folded lines": (START + b"X: a", b"\r\n ", 16384),
    "white space before a control character": (START + b"X:", b" ", 16384),
    "white space in a chunk line": (CHUNKED + b"1;", b" ", 16384),
    "small chunks": (CHUNKED, b"1\r\na\r\n", 16384),
    "small chunks, byte by byte": (CHUNKED, b"1\r\na\r\n", 1),
    "chunks": (CHUNKED, b"40\r\n" + b"a" * 64 + b"\r\n", 16384),
    "trailers, byte by byte": (CHUNKED + b"0\r\n", b"X: y\n", 1),
    "line ends": (b"", b"\r\n", 16384),
    "bytes ahead, byte by byte": (START + b"\r\n", b"a", 1),
}


@pytest.mark.parametrize(("start", "piece", "slice_bytes"), BOMBS.values(), ids=BOMBS)
@pytest.mark.parametrize("small", [1_000, 100_000])  # within the limits, and beyond them
def test_time_grows_no_faster_than_the_input(start: bytes, piece: bytes, slice_bytes: int, small: int) -> None:
    def seconds(size: int) -> float:
        data = start + piece * (size // len(piece)) + b"\x00\n\r\n\r\n"
        begin = time.process_time()
        with suppress(h11.RemoteProtocolError):
            list(parse(data, slice_bytes))
        return time.process_time() - begin

    # Measured in turns, so that a slow moment of the machine affects both. The minimum has the least disturbance.
    least, most = zip(*((seconds(small), seconds(8 * small)) for _ in range(9)), strict=True)
    assert min(most) < 12 * min(least) + 0.001
