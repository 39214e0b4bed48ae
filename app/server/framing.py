"""Limits on what a client may send over a connection, applied before h11 parses it.

h11 limits only incomplete input: a head that arrives in one read may have any size. Some of its regular expressions
take quadratic time on lines that they refuse. It also accepts requests whose body can be framed in two ways.
"""

import re
from typing import Protocol

import h11

from app.errors import HeadersTooLarge, MalformedRequest, UnfogError

MAX_HEADER_BYTES = 8 * 1024  # a line, with the lines that continue it
MAX_HEAD_BYTES = 32 * 1024  # the request line and all headers; the same for trailers
MAX_LINES = 1000  # in a head; each costs time in every search for a header
MAX_CHUNK_LINE_BYTES = 1024  # a chunk's size and its extensions
MAX_SMALL_CHUNKS = 1000  # this many chunks may have less than SMALL_CHUNK_BYTES on average
SMALL_CHUNK_BYTES = 64

_EMPTY_LINES = re.compile(rb"(?:\r\n)+")  # some clients end a body with one (RFC 9112, section 2.2)
# h11 refuses these too, but only after trying every way to split the white space before them.
_FORBIDDEN_IN_HEADER = re.compile(rb"[\x00\r\v\f]")
_ABSOLUTE = re.compile(rb"https?://[^/?#]*", re.IGNORECASE)  # the part of a request target before its path
_FORBIDDEN_IN_CHUNK_LINE = re.compile(rb"[\x00\r\n]")
# h11 reads or refuses in these states of the client. In all others the present request is complete.
_PARSED = (h11.IDLE, h11.SEND_BODY, h11.ERROR, h11.CLOSED)


class RefusedError(h11.RemoteProtocolError):
    """The client exceeded a limit or sent a malformed request."""


class _Part(Protocol):
    """A part of a request."""

    def measure(self, data: bytearray) -> int:
        """Returns how many of the first bytes belong to the part and can be parsed; UnfogError past a limit."""


class Head:
    """The request line and the headers, or the trailers. Searches each byte once, however the bytes arrive."""

    def __init__(self) -> None:
        self._line_start = 0
        self._searched = 0  # there is no line end between _line_start and here
        self._header_bytes = 0  # of the header in the line before
        self._num_lines = 0

    def measure(self, data: bytearray) -> int:
        """Returns the number of bytes of the head; 0 while it is incomplete."""
        while (end := data.find(b"\n", self._searched, MAX_HEAD_BYTES)) >= 0:
            line = data[self._line_start : end].removesuffix(b"\r")
            if not line:
                return end + 1
            self._header_bytes = self._check_size(data, len(line))
            self._check_line(line)
            self._line_start = self._searched = end + 1
        self._searched = len(data)
        self._check_size(data, len(data) - self._line_start - 1)  # the last byte may belong to the line end
        if len(data) >= MAX_HEAD_BYTES:
            raise HeadersTooLarge
        return 0

    def _check_size(self, data: bytearray, line_bytes: int) -> int:
        """Returns the size of the header so far. A line that begins with white space continues the one before."""
        is_continued = data.startswith((b" ", b"\t"), self._line_start)
        header_bytes = line_bytes + (self._header_bytes if is_continued else 0)
        if header_bytes > MAX_HEADER_BYTES:
            raise HeadersTooLarge
        return header_bytes

    def _check_line(self, line: bytearray) -> None:
        self._num_lines += 1
        if self._num_lines > MAX_LINES:
            raise HeadersTooLarge
        if _FORBIDDEN_IN_HEADER.search(line):
            raise MalformedRequest("A header contains a control character")


class SizedBody:
    """A body with a Content-Length, or an empty body without one."""

    def __init__(self, num_bytes: int) -> None:
        self._missing = num_bytes

    def measure(self, data: bytearray) -> int:
        """Returns the number of bytes that belong to the body."""
        size = min(self._missing, len(data))
        self._missing -= size
        return size


class ChunkedBody:
    """A body in chunks, and its trailers. h11 checks the syntax."""

    def __init__(self) -> None:
        self._missing = 0  # of the present chunk, with the line end that follows
        self._num_chunks = 0
        self._num_bytes = 0
        self._trailers: Head | None = None

    def measure(self, data: bytearray) -> int:
        """Returns the number of bytes that are complete size lines or parts of chunks."""
        position = 0
        while position < len(data) and not self._trailers:
            if self._missing:
                size = min(self._missing, len(data) - position)
                self._missing -= size
                position += size
                continue
            end = data.find(b"\r\n", position, position + MAX_CHUNK_LINE_BYTES)
            if end < 0:
                if len(data) - position >= MAX_CHUNK_LINE_BYTES:
                    raise MalformedRequest(f"A chunk's size line is longer than {MAX_CHUNK_LINE_BYTES} bytes")
                return position
            self._begin_chunk(data[position:end])
            position = end + 2
        if self._trailers and not position:
            return self._trailers.measure(data)
        return position

    def _begin_chunk(self, line: bytearray) -> None:
        if _FORBIDDEN_IN_CHUNK_LINE.search(line):
            raise MalformedRequest("A chunk's size line contains a control character")
        if self._num_chunks > MAX_SMALL_CHUNKS and self._num_bytes < SMALL_CHUNK_BYTES * self._num_chunks:
            raise MalformedRequest(
                f"The body has more than {MAX_SMALL_CHUNKS} chunks of less than {SMALL_CHUNK_BYTES} bytes on average"
            )
        try:
            size = int(line.partition(b";")[0], 16)
        except ValueError:
            raise MalformedRequest("A chunk's size is not a number") from None
        self._num_chunks += 1
        self._num_bytes += size
        if size:
            self._missing = size + 2
        else:
            self._trailers = Head()


class LimitedConnection(h11.Connection):
    """The server's side of a connection. Passes only bytes of the present request that are within limits to h11.

    Bytes that a client sends before its present request is answered are kept here, up to `max_ahead_bytes`.
    Reading therefore never pauses, and a disconnect is noticed.
    """

    def __init__(self, max_ahead_bytes: int) -> None:
        super().__init__(h11.SERVER, MAX_HEAD_BYTES)
        self._max_ahead_bytes = max_ahead_bytes
        self._unparsed = bytearray()
        self._part: _Part = Head()
        self.refusal: UnfogError = MalformedRequest()  # what to answer when next_event raises

    @property
    def has_part_of_head(self) -> bool:
        """True if a request has begun to arrive and its head is incomplete."""
        return self.their_state is h11.IDLE and bool(self._unparsed)

    def receive_data(self, data: bytes) -> None:
        """Keeps the bytes that have arrived."""
        self._unparsed += data

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """Returns h11's next event; RefusedError if the request is refused here. `refusal` is then the answer."""
        try:
            return self._next_event()
        except UnfogError as error:
            self.refusal = error
            raise RefusedError(str(error)) from error

    def _next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        if self.their_state not in _PARSED:
            if len(self._unparsed) > self._max_ahead_bytes:
                raise MalformedRequest(f"More than {self._max_ahead_bytes} bytes were sent before the answer")
            return h11.NEED_DATA
        event = super().next_event()
        while event is h11.NEED_DATA and (size := self._measure()):
            super().receive_data(bytes(self._unparsed[:size]))
            del self._unparsed[:size]
            event = super().next_event()
        if isinstance(event, h11.Request):
            self._part = _body_of(event)
            event = _with_path(event)
        elif isinstance(event, h11.EndOfMessage):
            self._part = Head()
        return event

    def _measure(self) -> int:
        if self.their_state is h11.IDLE:
            if empty_lines := _EMPTY_LINES.match(self._unparsed):
                del self._unparsed[: empty_lines.end()]
            if self._unparsed == b"\r":
                return 0
            if self._unparsed and self._unparsed[0] <= 0x20:  # not the start of a method: TLS, for example
                raise MalformedRequest
        return self._part.measure(self._unparsed)


def _body_of(request: h11.Request) -> _Part:
    """Returns the part for the body; MalformedRequest if another parser could see a different body (RFC 9112, 6.1)."""
    if not request.http_version.startswith(b"1."):
        raise MalformedRequest("The HTTP version must be 1.0 or 1.1")
    headers = dict(request.headers)  # h11 refuses several values of either
    length, encoding = headers.get(b"content-length"), headers.get(b"transfer-encoding")
    if encoding is None:
        return SizedBody(int(length or 0))
    if length is not None:
        raise MalformedRequest("A request cannot have both Content-Length and Transfer-Encoding")
    if request.http_version < b"1.1":
        raise MalformedRequest("A request of HTTP/1.0 cannot have Transfer-Encoding")
    return ChunkedBody()


def _with_path(request: h11.Request) -> h11.Request:
    """Returns the request with the path of an absolute target, as a server must accept it (RFC 9112, 3.2.2)."""
    if not (absolute := _ABSOLUTE.match(request.target)):
        return request
    rest = request.target[absolute.end() :]
    target = rest if rest.startswith(b"/") else b"/" + rest
    return h11.Request(method=request.method, headers=request.headers, target=target, http_version=request.http_version)
