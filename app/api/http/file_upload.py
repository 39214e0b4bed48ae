"""Receives an uploaded file: a body in multipart/form-data whose file is stored piece by piece while it arrives.

Only one piece of the file is in memory. A large file may take any time to arrive, but the client must not pause for
longer than UNFOG_READ_TIMEOUT, and must send SLOWEST bytes per second on average. Time that the database takes does not
count.
"""

import asyncio
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any

from fastapi import Request
from multipart import MultipartError, MultipartSegment, ParserLimitReached, PushMultipartParser

from app.api.http.context import context_of
from app.api.http.media_types import MULTIPART
from app.api.http.requests import UNKNOWN_FIELD, boundary_of, check_length, media_type_of
from app.batches.database import Database
from app.batches.files import Files, Upload
from app.batches.records import UPLOADED, File
from app.errors import (
    BodyTooLarge,
    InvalidRequest,
    MalformedRequest,
    RequestTimeout,
    UnfogError,
    UnsupportedMediaType,
)
from app.settings import Settings

PIECE_BYTES = 1024 * 1024  # of the file; all pieces that are stored have this size, except the last one
FORM_BYTES = 64 * 1024  # limit for the body without the content of the file
MAX_PART_HEADER_BYTES = 4096  # a name of MAX_FILENAME characters has at most 1 KiB
MAX_TEXT_BYTES = 1024
MAX_FILENAME = 255  # characters
MAX_NAME = 200  # characters of the name of a field in an error
MIN_LIFETIME, MAX_LIFETIME = 3600, 30 * 24 * 3600  # seconds after which a file expires, as in OpenAI's API
FILE, PURPOSE, ANCHOR, SECONDS = "file", "purpose", "expires_after[anchor]", "expires_after[seconds]"
CREATED_AT = "created_at"
SLOWEST = 32 * 1024  # bytes per second on average, after the time that a client may be silent
REQUIRED, SILENT = "Field required", "No byte of the body arrived for {seconds:g} s"
SLOW = f"The body arrived more slowly than {SLOWEST // 1024} KiB/s"

_SECONDS = re.compile(r"[0-9]{1,7}")


async def receive_file(request: Request, database: Database, files: Files, settings: Settings) -> File:
    """Stores the file of a request, and returns it. If this fails, nothing of the file is left.

    Raises UnsupportedMediaType, BodyTooLarge, RequestTimeout, MalformedRequest, InvalidRequest, QuotaExceeded,
    StorageFull, StorageUnavailable or ClientDisconnect.
    """
    if media_type_of(request) != MULTIPART:
        raise UnsupportedMediaType(f"Content-Type must be {MULTIPART}")
    boundary, owner, form = boundary_of(request), context_of(request.scope).owner, _Form()
    body = _Body(request, settings.max_file_bytes + FORM_BYTES, settings.read_timeout)
    storage = _Storage(database, lambda: files.begin(owner, form.filename))
    try:
        with _parser(boundary) as parser:
            while chunk := await body.read():
                for event in parser.parse(chunk):
                    form.add(event)
                while len(form.piece) >= PIECE_BYTES:
                    await storage.add(form.take_piece())
        form.check()
        return await storage.finish(form.take_piece(), form.lifetime)
    except BaseException:
        await storage.abandon()
        raise


class _Body:
    """The body of a request, in the chunks in which it arrives."""

    def __init__(self, request: Request, max_bytes: int, seconds: float) -> None:
        """Raises BodyTooLarge if Content-Length exceeds the limit."""
        check_length(request, max_bytes)
        self._chunks, self._size, self._waited = request.stream(), 0, 0.0
        self._max_bytes, self._seconds = max_bytes, seconds

    async def read(self) -> bytes:
        """Returns the next chunk. It is empty at the end of the body.

        Raises BodyTooLarge, ClientDisconnect, and RequestTimeout if the client is silent for too long, or too slow.
        """
        start, left = monotonic(), self._seconds + self._size / SLOWEST - self._waited
        if left <= 0:
            raise RequestTimeout(SLOW)
        try:
            async with asyncio.timeout(min(self._seconds, left)):
                chunk = await anext(self._chunks, b"")
        except TimeoutError:
            reason = SLOW if left < self._seconds else SILENT.format(seconds=self._seconds)
            raise RequestTimeout(reason) from None
        self._waited += monotonic() - start
        self._size += len(chunk)
        if self._size > self._max_bytes:
            raise BodyTooLarge(self._max_bytes)
        return chunk


@contextmanager
def _parser(boundary: str) -> Iterator[PushMultipartParser]:
    """Yields a parser. Raises MalformedRequest or InvalidRequest instead of its errors, or if the body is incomplete.

    The parser is not strict, because it would refuse a line break after the last boundary if it arrives alone.
    """
    try:
        with PushMultipartParser(boundary, max_header_size=MAX_PART_HEADER_BYTES) as parser:
            yield parser
    except ParserLimitReached as error:
        raise InvalidRequest([{"loc": ["body"], "msg": "The headers of a part are too long"}]) from error
    except MultipartError as error:
        raise MalformedRequest("The body is not valid multipart/form-data, or it is incomplete") from error


def _purpose(text: str) -> None:
    if text != UPLOADED:
        raise ValueError(f"Input should be '{UPLOADED}'")


def _anchor(text: str) -> None:
    if text != CREATED_AT:
        raise ValueError(f"Input should be '{CREATED_AT}'")


def _seconds(text: str) -> int:
    if not _SECONDS.fullmatch(text) or not MIN_LIFETIME <= int(text) <= MAX_LIFETIME:
        raise ValueError(f"Input should be a whole number from {MIN_LIFETIME} to {MAX_LIFETIME}")
    return int(text)


# The text fields. Each function returns the value, or raises ValueError if it is not permitted.
_TEXTS: dict[str, Callable[[str], Any]] = {PURPOSE: _purpose, ANCHOR: _anchor, SECONDS: _seconds}


class _Form:
    """The fields that have arrived, in any order, and the part of the file that is not stored yet."""

    def __init__(self) -> None:
        self.filename = ""
        self.piece = bytearray()
        self._file_size = 0  # bytes
        self._values: dict[str, Any] = {}  # the text fields that are complete
        self._names = set[str]()  # of the parts so far
        self._name = ""  # of the current part
        self._text = bytearray()  # of the current part

    @property
    def lifetime(self) -> int | None:
        """The number of seconds after which the file expires, or None for the default."""
        return self._values.get(SECONDS)

    def add(self, event: MultipartSegment | bytes | None) -> None:
        """Handles an event of the parser: the start of a part, some bytes of it, or its end.

        Raises InvalidRequest.
        """
        if event is None:
            self._end_part()
        elif isinstance(event, bytes | bytearray):
            self._add_bytes(event)
        else:
            self._begin_part(event.name or "", event.filename)

    def take_piece(self) -> bytes:
        """Returns at most PIECE_BYTES of the file that are not stored yet, and removes them here."""
        piece = bytes(self.piece[:PIECE_BYTES])
        del self.piece[:PIECE_BYTES]
        return piece

    def check(self) -> None:
        """Raises InvalidRequest if a field is missing. All parts have arrived."""
        for name in (PURPOSE, FILE):
            if name not in self._names or (name in _TEXTS and name not in self._values):
                raise InvalidRequest.of(name, REQUIRED)
        for name, other in ((ANCHOR, SECONDS), (SECONDS, ANCHOR)):
            if other in self._values and name not in self._values:
                raise InvalidRequest.of(name, REQUIRED)
        if not self._file_size:
            raise InvalidRequest.of(FILE, "The file is empty")

    def _begin_part(self, name: str, filename: str | None) -> None:
        if name != FILE and name not in _TEXTS:
            raise InvalidRequest.of(name[:MAX_NAME], UNKNOWN_FIELD)
        if name in self._names:
            raise InvalidRequest.of(name, "Field occurs more than once. Send it once")
        self._names.add(name)
        self._name = name
        self._text.clear()
        if name == FILE:
            self.filename = _checked(filename)

    def _add_bytes(self, content: bytes | bytearray) -> None:
        if self._name == FILE:
            self.piece += content
            self._file_size += len(content)
            return
        self._text += content
        if len(self._text) > MAX_TEXT_BYTES:
            raise InvalidRequest.of(self._name, f"The field has more than {MAX_TEXT_BYTES} bytes")

    def _end_part(self) -> None:
        if self._name == FILE or not self._text:  # Swagger UI sends empty fields.
            return
        try:
            self._values[self._name] = _TEXTS[self._name](self._text.decode("utf-8"))
        except UnicodeDecodeError:
            raise InvalidRequest.of(self._name, "The field is not text in UTF-8") from None
        except ValueError as error:
            raise InvalidRequest.of(self._name, str(error)) from None


def _checked(filename: str | None) -> str:
    """Returns the name of the file. Raises InvalidRequest if it is not permitted."""
    if not filename:
        raise InvalidRequest.of(FILE, "The part has no filename. Send the file with a filename")
    if len(filename) > MAX_FILENAME or not filename.isprintable():
        raise InvalidRequest.of(FILE, f"The filename must have at most {MAX_FILENAME} characters, all printable")
    return filename


class _Storage:
    """Stores the pieces of a file one after the other, in threads of the database."""

    def __init__(self, database: Database, begin: Callable[[], Upload]) -> None:
        self._database, self._begin = database, begin
        self._upload: Upload | None = None  # None before the first piece, and when the file is complete

    async def add(self, piece: bytes) -> None:
        """Stores a piece. Raises the errors of Files.begin and Upload.add."""
        await self._database.run(self._add, piece)

    async def finish(self, piece: bytes, lifetime: int | None) -> File:
        """Stores the last piece, and returns the file, which expires after `lifetime` seconds.

        Raises the errors of `add`.
        """
        return await self._database.run(self._finish, piece, lifetime)

    async def abandon(self) -> None:
        """Deletes what was stored."""
        if self._upload:
            with suppress(UnfogError):  # The upload then expires.
                await self._database.run(self._upload.abandon)

    def _add(self, piece: bytes) -> Upload:
        self._upload = self._upload or self._begin()
        if piece:
            self._upload.add(piece)
        return self._upload

    def _finish(self, piece: bytes, lifetime: int | None) -> File:
        file = self._add(piece).finish(lifetime)
        self._upload = None
        return file
