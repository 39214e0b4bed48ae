"""Limits for the bytes that a client sends, which are applied before h11 parses them.

h11 alone is not enough for three reasons. It limits only incomplete input, so that a head in a single read can have any
size. Some of its regular expressions take quadratic time on invalid lines. It accepts requests with both Content-Length
and Transfer-Encoding, which two servers can read as different bodies (request smuggling).
"""

import re
from typing import Protocol

import h11

from app.errors import HeadersTooLarge, MalformedRequest, UnfogError

MAX_HEADER_BYTES = 8 * 1024  # limit for the request line, and for each header with its continuation lines
MAX_HEAD_BYTES = 32 * 1024  # limit for the request line and all headers together, and for all trailers together
MAX_LINES = 1000  # limit for the lines of a head; each line costs time whenever the application looks up a header
MAX_CHUNK_LINE_BYTES = 1024  # limit for the line with a chunk's size and extensions
MAX_SMALL_CHUNKS = 1000  # a body with more chunks must have at least SMALL_CHUNK_BYTES per chunk on average
SMALL_CHUNK_BYTES = 64

_EMPTY_LINES = re.compile(rb"(?:\r\n)+")  # Some clients send an empty line after a body (RFC 9112, section 2.2).
# h11 rejects these characters too, but its regular expression takes quadratic time on white space before them.
_FORBIDDEN_IN_HEADER = re.compile(rb"[\x00\r\v\f]")
_ABSOLUTE = re.compile(rb"https?://[^/?#]*", re.IGNORECASE)  # the part of a request target before its path
_FORBIDDEN_IN_CHUNK_LINE = re.compile(rb"[\x00\r\n]")
# In these states of the client, h11 parses or rejects input. In all other states the current request is complete.
_PARSED = (h11.IDLE, h11.SEND_BODY, h11.ERROR, h11.CLOSED)


class RefusedError(h11.RemoteProtocolError):
    """The client exceeded a limit or sent a malformed request."""


class _Part(Protocol):
    """The part of a request that is arriving: the head or the body."""

    def measure(self, data: bytearray) -> int:
        """Returns how many of the first bytes of `data` belong to this part and can be passed to h11 now.

        Raises UnfogError if the bytes exceed a limit.
        """


class Head:
    """The request line and the headers, or the trailers of a chunked body.

    Searches each byte once, even if the bytes arrive one by one.
    """

    def __init__(self) -> None:
        self._line_start = 0
        self._searched = 0  # the end of the bytes that were searched for a line end
        self._header_bytes = 0  # size of the current header up to the previous line
        self._num_lines = 0

    def measure(self, data: bytearray) -> int:
        """Returns the number of bytes of the head, or 0 while it is incomplete."""
        while (end := data.find(b"\n", self._searched, MAX_HEAD_BYTES)) >= 0:
            line = data[self._line_start : end].removesuffix(b"\r")
            if not line:
                return end + 1
            self._header_bytes = self._check_size(data, len(line))
            self._check_line(line)
            self._line_start = self._searched = end + 1
        self._searched = len(data)
        self._check_size(data, len(data) - self._line_start - 1)  # The last byte may belong to the line end.
        if len(data) >= MAX_HEAD_BYTES:
            raise HeadersTooLarge
        return 0

    def _check_size(self, data: bytearray, line_bytes: int) -> int:
        """Returns the size of the header so far. A line that starts with white space continues the previous line."""
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
    """A body with a Content-Length, or an empty body if there is no such header."""

    def __init__(self, num_bytes: int) -> None:
        self._missing = num_bytes

    @property
    def is_complete(self) -> bool:
        """True if all bytes of the body have arrived."""
        return not self._missing

    def measure(self, data: bytearray) -> int:
        """Returns the number of bytes that belong to the body."""
        size = min(self._missing, len(data))
        self._missing -= size
        return size


class ChunkedBody:
    """A body in chunks and its trailers. This class applies the limits, and h11 checks the syntax."""

    def __init__(self) -> None:
        self._missing = 0  # number of bytes of the current chunk and its line end that have not arrived
        self._num_chunks = 0
        self._num_bytes = 0
        self._trailers: Head | None = None

    def measure(self, data: bytearray) -> int:
        """Returns the number of bytes that are complete size lines, parts of chunks, or complete trailers."""
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
                f"The body has more than {MAX_SMALL_CHUNKS} chunks with an average of less than {SMALL_CHUNK_BYTES} "
                "bytes. Send larger chunks"
            )
        try:
            size = int(line.partition(b";")[0], 16)
        except ValueError:
            raise MalformedRequest("A chunk's size is not a hexadecimal number") from None
        self._num_chunks += 1
        self._num_bytes += size
        if size:
            self._missing = size + 2
        else:
            self._trailers = Head()


class LimitedConnection(h11.Connection):
    """The server's side of a connection. Passes only bytes of the current request that are within the limits to h11.

    A client can send bytes of its next request before the current request is answered (pipelining). These bytes are
    kept here, up to `max_ahead_bytes`. Reading therefore never pauses, and a disconnect is detected immediately.
    """

    def __init__(self, max_ahead_bytes: int) -> None:
        super().__init__(h11.SERVER, MAX_HEAD_BYTES)
        self._max_ahead_bytes = max_ahead_bytes
        self._unparsed = bytearray()
        self._part: _Part = Head()
        # True if h11 has no bytes and returns no event before it gets some. Each call of h11 takes time.
        self._needs_bytes = True
        self._head_of_answer = b""  # the head of an answer that is sent with the first part of its body
        self.refusal: UnfogError = MalformedRequest()  # the answer to send if next_event raises

    @property
    def has_part_of_head(self) -> bool:
        """True if a part of a request head has arrived, but not the complete head."""
        return self.their_state is h11.IDLE and bool(self._unparsed)

    def receive_data(self, data: bytes) -> None:
        """Keeps the bytes that have arrived."""
        self._unparsed += data

    def send(self, event: h11.Event) -> bytes | None:  # type: ignore[override] # h11 declares a type for each event
        """Returns the bytes to send for an event of the answer.

        The head of an answer with a Content-Length is returned together with the first part of the body, which follows
        without delay. This saves a system call, and the client reads once instead of twice.
        """
        content = super().send(event)
        if isinstance(event, h11.Response) and any(name == b"content-length" for name, _ in event.headers):
            self._head_of_answer = content or b""
            return b""
        if self._head_of_answer and content is not None:
            content, self._head_of_answer = self._head_of_answer + content, b""
        return content

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """Returns h11's next event. Raises RefusedError if the bytes exceed a limit. `refusal` is then the answer."""
        try:
            return self._next_event()
        except UnfogError as error:
            self.refusal = error
            raise RefusedError(str(error)) from error

    def _next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        if self.their_state not in _PARSED:
            if len(self._unparsed) > self._max_ahead_bytes:
                raise MalformedRequest(
                    f"More than {self._max_ahead_bytes} bytes were sent before the current request was answered"
                )
            return h11.NEED_DATA
        needs_bytes, self._needs_bytes = self._needs_bytes, False  # It stays False if an error is raised.
        event = h11.NEED_DATA if needs_bytes else super().next_event()
        while event is h11.NEED_DATA and (size := self._measure()):
            super().receive_data(bytes(self._unparsed[:size]))
            del self._unparsed[:size]
            event = super().next_event()
        if isinstance(event, h11.Request):
            self._part = _body_of(event)
            event = _with_path(event)
        elif isinstance(event, h11.EndOfMessage):
            self._part = Head()
        # Without further bytes, h11 returns only the next chunk that has arrived, and the end of the message.
        is_complete = isinstance(self._part, SizedBody) and self._part.is_complete
        self._needs_bytes = not (isinstance(event, h11.Data) or is_complete)
        return event

    def _measure(self) -> int:
        if self.their_state is h11.IDLE:
            if empty_lines := _EMPTY_LINES.match(self._unparsed):
                del self._unparsed[: empty_lines.end()]
            if self._unparsed == b"\r":
                return 0
            # No HTTP method starts with such a byte. A TLS handshake starts with one.
            if self._unparsed and self._unparsed[0] <= 0x20:
                raise MalformedRequest
        return self._part.measure(self._unparsed)


def _body_of(request: h11.Request) -> _Part:
    """Returns the part for the body.

    Raises MalformedRequest if another parser could see a different body (RFC 9112, section 6.1).
    """
    if not request.http_version.startswith(b"1."):
        raise MalformedRequest("The HTTP version must be 1.0 or 1.1")
    headers = dict(request.headers)  # h11 has rejected requests in which one of these two headers has several values
    length, encoding = headers.get(b"content-length"), headers.get(b"transfer-encoding")
    if encoding is None:
        return SizedBody(int(length or 0))
    if length is not None:
        raise MalformedRequest("A request cannot have both Content-Length and Transfer-Encoding")
    if request.http_version < b"1.1":
        raise MalformedRequest("An HTTP/1.0 request cannot have Transfer-Encoding")
    return ChunkedBody()


def _with_path(request: h11.Request) -> h11.Request:
    """Returns the request with an absolute target (`http://host/path`) reduced to its path.

    A server must accept absolute targets (RFC 9112, section 3.2.2).
    """
    if not (absolute := _ABSOLUTE.match(request.target)):
        return request
    rest = request.target[absolute.end() :]
    target = rest if rest.startswith(b"/") else b"/" + rest
    return h11.Request(method=request.method, headers=request.headers, target=target, http_version=request.http_version)
