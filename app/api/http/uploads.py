"""Reads requests with pictures: multipart/form-data, or JSON with the pictures in base64.

Only the arrival of the body is handled on the event loop. Parsing, validation and decoding run in the worker threads of
a PictureQueue. A worker must not hold the interpreter lock for long, because the event loop would wait for it. JSON is
therefore checked before it is parsed.
"""

import asyncio
import binascii
import math
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, TypeVar

from fastapi import Request
from multipart import MultipartError, ParserLimitReached, PushMultipartParser
from pydantic import BaseModel

from app.api.http.client_address import client_name
from app.api.http.context import context_of
from app.api.http.media_types import JSON, MULTIPART
from app.api.http.picture_queue import NUM_WORKERS, PictureQueue, Step
from app.api.http.requests import boundary_of, cancel_on_disconnect, media_type_of, parse_json, read_body, validate
from app.api.http.upload_memory import Upload, UploadMemory
from app.errors import (
    DeadlineExceeded,
    InvalidImage,
    InvalidRequest,
    MalformedRequest,
    UnsupportedMediaType,
)
from app.settings import Settings
from app.tasks.picture_files import PictureError, PictureFile, inspect
from app.tasks.sampling import TimedFields

MAX_BODIES = 16  # limit for all bodies in memory together, as a multiple of the largest body
MAX_PARTS = 32  # of a multipart body, without the elements of lists that have a limit in the schema
MAX_PART_HEADER_BYTES = 1024
MAX_TEXT_BYTES = 16 * 1024  # limit for a text field, and for a JSON body without the contents of its strings
MAX_STRINGS = 256  # limit for the strings of a JSON body, including field names
MAX_ESCAPES = 128 * 1024  # limit for backslashes in a JSON body; base64 in lines of 76 characters has 2% of them
# The work to open a picture and to convert it, as a number of decoded pixels. A picture of at most SMALLEST_PIXELS is
# hardly converted. The conversion of any other takes CONVERTING, and COARSE for each of at most COARSE_PIXELS pixels.
OPENING, CONVERTING, COARSE = 20_000, 400_000, 12
SMALLEST_PIXELS, COARSE_PIXELS = 28**2, 256**2

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false")
_DATA_URL = re.compile(r"data:[\w.+/-]*(?:;[\w.+=-]*)*;base64,", re.IGNORECASE)
_STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")

C = TypeVar("C")
# Reads the content of a file, given the result of the check of its request. Raises PictureError.
Reader = Callable[[C, bytes], T]


def _unchecked(fields: Any) -> Any:
    return fields


@dataclass(frozen=True, slots=True)
class _File:
    """A file in an image field. `index` has its place if the field is a list."""

    field: str
    index: tuple[int, ...]
    data: bytes
    work: int


class ImageReader:
    """Reads requests with pictures. All routes share one reader, so that its limits hold for the whole service."""

    def __init__(self, settings: Settings) -> None:
        self._max_bytes = settings.max_image_bytes
        self._read_seconds, self._decode_seconds = settings.read_timeout, settings.short_timeout
        self._queue = PictureQueue()
        self._memory = UploadMemory(MAX_BODIES * settings.max_image_bytes)
        self._lines = asyncio.Semaphore(NUM_WORKERS)  # lines of batches that are read at the same time

    async def read(
        self,
        request: Request,
        schema: type[M],
        readers: Mapping[str, Reader[C, T]],
        *,
        check: Callable[[M], C] = _unchecked,
        lenient: bool = False,
    ) -> tuple[C, dict[str, list[T]]]:
        """Returns the result of `check`, and the converted pictures of each image field that is present.

        In `schema`, an image field has the type Base64 or list[Base64]. In the returned model it has empty strings. In
        a multipart body, a list has one part for each element. `readers` has the function that reads the files of each
        image field, in the order in which the fields are read. It is called in a worker thread with the result of
        `check` and the content of a file. A list of pictures is read one by one. The error of an element names its
        index. `check` is called with the validated fields before a picture is decoded. It raises an error for values
        that are refused, and returns what the readers and the caller need. Without `check`, this is the fields.

        If `lenient` is True, a body of any other Content-Type is parsed as JSON. In a multipart body, the names of the
        parts may then end with `[]`, and text parts without content are ignored.

        Raises the errors of `check` and of the readers, but InvalidImage instead of PictureError. Also raises
        UnsupportedMediaType, BodyTooLarge, RequestTimeout, Overloaded, MalformedJSON, MalformedRequest, InvalidRequest,
        InvalidImage, DeadlineExceeded or ClientGoneError.
        """
        parse = _parser_of(request, schema, lenient=lenient)
        seconds = math.inf if context_of(request.scope).is_background else self._decode_seconds
        async with self._hold(request) as upload:
            bodies = [
                await self._memory.receive(upload, partial(read_body, request, self._max_bytes, self._read_seconds))
            ]
            parsing = Step(OPENING + len(bodies[0]), partial(_parse, bodies, parse, schema, tuple(readers), check))
            try:
                async with asyncio.timeout(seconds) as deadline:
                    return await cancel_on_disconnect(request, self._decode(parsing, readers, deadline, seconds))
            except TimeoutError:
                raise DeadlineExceeded("The picture was not decoded before the deadline. Retry later") from None

    @asynccontextmanager
    async def _hold(self, request: Request) -> AsyncIterator[Upload]:
        """Creates the body of a request. Its memory counts until the end of the block.

        A line of a batch first waits until few other lines are read, so that they do not fill the queue.
        """
        context = context_of(request.scope)
        async with self._lines if context.is_background else nullcontext():
            with self._memory.hold(client_name(request.scope, context.key)) as upload:
                yield upload

    async def _decode(
        self,
        parsing: Step[tuple[M, C, list[_File]]],
        readers: Mapping[str, Reader[C, T]],
        deadline: asyncio.Timeout,
        seconds: float,
    ) -> tuple[C, dict[str, list[T]]]:
        """Parses a body and decodes its pictures. Moves the deadline if the request has an earlier one.

        The deadline is after `seconds`. If this is infinite, it is not moved.
        """
        end = deadline.when()
        assert end is not None, "decoding has a deadline"
        ((fields, checked, files),) = await asyncio.wrap_future(self._queue.submit([parsing], seconds))
        requested = fields.timeout_seconds if isinstance(fields, TimedFields) else None
        if requested and requested < seconds < math.inf:
            end += requested - seconds
            deadline.reschedule(end)
        names = [file.field for file in files]
        steps = [Step(file.work, partial(_read, checked, file, readers[file.field])) for file in files]
        files.clear()  # Each step holds its file until it has run.
        work = self._queue.submit(steps, end - asyncio.get_running_loop().time())
        del steps
        converted: list[T] = await asyncio.wrap_future(work)
        pictures: dict[str, list[T]] = {}
        for name, picture in zip(names, converted, strict=True):
            pictures.setdefault(name, []).append(picture)
        return checked, pictures

    def close(self) -> None:
        """Cancels the work that has not begun."""
        self._queue.close()


# A parsed body: the fields as in JSON. A picture is bytes (multipart) or a string (base64).
Parser = Callable[[bytes], dict[str, Any]]


def _parser_of(request: Request, schema: type[BaseModel], *, lenient: bool) -> Parser:
    """Returns the parser for the Content-Type of the request."""
    media_type = media_type_of(request)
    if media_type == JSON or (lenient and media_type != MULTIPART):
        return _parse_json
    if media_type != MULTIPART:
        raise UnsupportedMediaType(f"Content-Type must be {JSON} or {MULTIPART}")
    boundary = boundary_of(request)
    return lambda body: _parse_multipart(body, boundary, schema, lenient=lenient)


def _parse(
    bodies: list[bytes],
    parse: Parser,
    schema: type[M],
    names: tuple[str, ...],
    check: Callable[[M], C],
) -> tuple[M, C, list[_File]]:
    """Parses the only body of the list, and removes it there. `names` has the image fields in their order."""
    document = parse(bodies.pop())
    contents: dict[str, list[Any]] = {}
    lists = {name for name in names if isinstance(document.get(name), list)}
    for name in names:
        value = document.get(name)
        values: list[Any] = value if isinstance(value, list) else [value]
        if values and all(isinstance(each, bytes | str) for each in values):
            contents[name] = values
            document[name] = [""] * len(values) if name in lists else ""
    fields = validate(document, schema)
    checked = check(fields)
    files = [
        _inspect(name, (i,) if name in lists else (), content)
        for name, values in contents.items()
        for i, content in enumerate(values)
    ]
    return fields, checked, files


def _inspect(field: str, index: tuple[int, ...], content: bytes | str) -> _File:
    """Returns the file of a part or of base64 text, with the work that it needs. Raises InvalidImage."""
    try:
        data = _decode_base64(content) if isinstance(content, str) else content
        return _File(field, index, data, _work_of(inspect(data)))
    except PictureError as error:
        raise InvalidImage.of(field, str(error), *index) from error


def _work_of(file: PictureFile) -> int:
    pixels = file.width * file.height
    converting = CONVERTING + COARSE * min(pixels, COARSE_PIXELS) if pixels > SMALLEST_PIXELS else 0
    return OPENING + pixels + converting


def _read(checked: C, file: _File, read: Reader[C, T]) -> T:
    """Decodes and converts a picture. Raises InvalidImage."""
    try:
        return read(checked, file.data)
    except PictureError as error:
        raise InvalidImage.of(file.field, str(error), *file.index) from error


def _decode_base64(text: str) -> bytes:
    """Decodes base64 in the standard or the URL-safe alphabet, with or without padding, white space and a data URL."""
    if text[:5].lower() == "data:" and (prefix := _DATA_URL.match(text[:256])):
        text = text[prefix.end() :]
    try:
        data = text.encode("ascii").translate(_STANDARD_ALPHABET, b" \t\r\n")
        data = data.rstrip(b"=")
        return binascii.a2b_base64(data + b"=" * (-len(data) % 4), strict_mode=True)
    except ValueError:  # also UnicodeEncodeError and binascii.Error
        raise PictureError("The value is not valid base64. Encode the bytes of the file in base64") from None


def _parse_json(body: bytes) -> dict[str, Any]:
    _check_json(body)
    document = parse_json(body)
    if not isinstance(document, dict):
        raise _invalid("Input should be an object")
    return document


def _check_json(body: bytes) -> None:
    """Refuses JSON that is expensive to parse. The time of this check is short, and linear in the size of the body.

    A request needs a few fields, and only its strings can be long. Everything outside of the strings is therefore
    limited to the size of a request without pictures. This also limits the nesting and the length of numbers.
    """
    if body.count(b'"') > 2 * MAX_STRINGS:
        raise _invalid(f"The JSON has more than {MAX_STRINGS} strings. Send one object with the fields of this route")
    if body.count(b"\\") > MAX_ESCAPES:
        raise _invalid(f"The JSON has more than {MAX_ESCAPES} backslashes. Send base64 without escapes")
    if _bytes_outside_strings(body) > MAX_TEXT_BYTES:
        raise _invalid(
            f"The JSON has more than {MAX_TEXT_BYTES} bytes outside of its strings. Send one object with the fields "
            "of this route"
        )


def _bytes_outside_strings(body: bytes) -> int:
    """Returns the number of bytes outside of JSON strings. A regular expression would take ten times as long."""
    outside, is_inside = 0, False
    for part in body.split(b'"'):
        if is_inside:  # A quote after an odd number of backslashes does not end the string.
            is_inside = (len(part) - len(part.rstrip(b"\\"))) % 2 == 1
        else:
            outside += len(part)
            is_inside = True
    return outside


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest([{"loc": ["body"], "msg": message}])


def _parse_multipart(body: bytes, boundary: str, schema: type[BaseModel], *, lenient: bool) -> dict[str, Any]:
    """Parses a multipart body (RFC 7578)."""
    document: dict[str, Any] = {}
    kinds = _kinds_of(schema)
    max_parts = MAX_PARTS + sum(kind.max_items for kind in kinds.values())
    for part, content in _parts(body, boundary, max_parts):
        name = part.removesuffix("[]") if lenient else part
        kind = kinds.get(name, _Kind())
        if lenient and not content and not kind.is_image:
            continue
        value: Any = content
        if name not in kinds:
            value = ""  # The content can be a file. Validation refuses the field, or ignores it if the schema says so.
        elif not kind.is_image:
            value = _text(name, content, kind, *([len(document.get(name, []))] if kind.is_list else []))
        if kind.is_list:
            document.setdefault(name, []).append(value)
        elif name in document:
            raise InvalidRequest.of(name[:200], "Field occurs more than once. Send it once")
        else:
            document[name] = value
    return document


def _parts(body: bytes, boundary: str, max_parts: int) -> list[tuple[str, bytes]]:
    """Returns the name and the content of each part."""
    parts: list[tuple[str, bytes]] = []
    chunks: list[bytes] = []
    name = ""
    try:
        with PushMultipartParser(
            boundary,
            max_header_size=MAX_PART_HEADER_BYTES,
            max_segment_count=max_parts,
            strict=True,
        ) as parser:
            for event in parser.parse(body) if body else ():
                if event is None:
                    parts.append((name, b"".join(chunks)))
                elif isinstance(event, bytes | bytearray):
                    chunks.append(bytes(event))
                else:
                    name, chunks = event.name or "", []
    except ParserLimitReached as error:
        raise _invalid(
            f"The multipart body has more than {max_parts} parts, or headers of a part are too long. Send one part for "
            "each field"
        ) from error
    except MultipartError as error:
        raise MalformedRequest("The body is not valid multipart/form-data, or it is incomplete") from error
    return parts


@dataclass(frozen=True, slots=True)
class _Kind:
    """How a field of a multipart body is converted."""

    is_image: bool = False
    is_list: bool = False
    has_numbers: bool = False  # true for a number or a boolean
    max_items: int = 0  # the limit of a list; 0 if it has none


@cache
def _kinds_of(schema: type[BaseModel]) -> dict[str, _Kind]:
    """Returns the kind of each field, from the JSON schema."""
    return {name: _kind_of(field) for name, field in schema.model_json_schema()["properties"].items()}


def _kind_of(field: dict[str, Any]) -> _Kind:
    if field.get("type") == "array":
        return replace(_kind_of(field["items"]), is_list=True, max_items=field.get("maxItems", 0))
    kinds = (field, *field.get("anyOf", ()))
    types = {each.get("type") for each in kinds}
    is_text = any(each.get("type") == "string" and "const" not in each for each in kinds)  # A number is a text, too.
    return _Kind(
        is_image=field.get("contentEncoding") == "base64",
        has_numbers=not is_text and not types.isdisjoint({"integer", "number", "boolean"}),
    )


def _text(name: str, content: bytes, kind: _Kind, *index: int) -> Any:
    """Returns the value of a text field: a number or a boolean in the syntax of JSON if the schema permits it.

    `index` is the place of the element if the field is a list.
    """
    if len(content) > MAX_TEXT_BYTES:
        raise InvalidRequest.of(name[:200], f"The field has more than {MAX_TEXT_BYTES} bytes", *index)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidRequest.of(name[:200], "The field is not text in UTF-8", *index) from None
    return parse_json(content) if kind.has_numbers and _NUMBER.fullmatch(text) else text
