"""Reads requests: parses and validates the body, and detects disconnected clients."""

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from types import NoneType
from typing import Any, TypeVar, cast, get_args

from fastapi import Request
from multipart import parse_options_header
from pydantic import BaseModel, ValidationError

from app.errors import (
    BodyTooLarge,
    InvalidRequest,
    MalformedJSON,
    MalformedRequest,
    RequestTimeout,
    UnsupportedMediaType,
)
from app.tasks.fields import problems_of
from app.tasks.names import nearest

MAX_UNKNOWN_FIELDS = 32  # limit of unknown fields that an error lists; a body can have more
NOT_AN_OBJECT = "Input should be an object"
UNKNOWN_FIELD = "Unknown field"
MAX_BOUNDARY = 70  # RFC 2046, section 5.1.1
MAX_DIGITS = 400  # limit of digits of a JSON integer; a longer integer is parsed as a float

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


class ClientGoneError(Exception):
    """The client has closed the connection, so no response can be sent."""


async def read_json(request: Request, schema: type[M], max_bytes: int, seconds: float) -> M:
    """Reads and validates the body, which must arrive within `seconds`.

    Raises UnsupportedMediaType, BodyTooLarge, RequestTimeout, MalformedJSON or InvalidRequest.
    """
    if media_type_of(request) != "application/json":
        raise UnsupportedMediaType
    return validate(parse_json(await read_body(request, max_bytes, seconds)), schema)


def media_type_of(request: Request) -> str:
    """Returns the media type of the body in lower case, without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def boundary_of(request: Request) -> str:
    """Returns the boundary of a multipart body. Raises MalformedRequest if Content-Type has no valid one."""
    _, parameters = parse_options_header(request.headers["content-type"])
    boundary: str = parameters.get("boundary", "")
    if not 0 < len(boundary) <= MAX_BOUNDARY or not boundary.isascii():
        raise MalformedRequest(f"Content-Type needs a boundary of 1 to {MAX_BOUNDARY} characters")
    return boundary


def check_single(request: Request, header: str) -> None:
    """Raises InvalidRequest if a header occurs more than once. Only its first value would be used."""
    if len(request.headers.getlist(header)) > 1:
        raise InvalidRequest([{"loc": ["header", header], "msg": "Header occurs more than once. Send it once"}])


def validate(document: Any, schema: type[M]) -> M:
    """Validates the fields of a request. Raises InvalidRequest, which lists at most MAX_UNKNOWN_FIELDS unknown ones."""
    if not isinstance(document, dict):
        raise InvalidRequest([{"loc": ["body"], "msg": NOT_AN_OBJECT}])
    unknown = [name for name in document if name not in schema.model_fields]
    for name in unknown[MAX_UNKNOWN_FIELDS:]:
        del document[name]
    try:
        return schema.model_validate(document)
    except ValidationError as error:
        raise InvalidRequest(_describe(error, schema)) from error


async def read_body(
    request: Request, max_bytes: int, seconds: float, on_bytes: Callable[[int], None] = lambda _: None
) -> bytes:
    """Reads the body. Calls `on_bytes` with the size of each chunk before the chunk is stored.

    Raises BodyTooLarge, or RequestTimeout after `seconds`.
    """
    check_length(request, max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                on_bytes(len(chunk))
                body += chunk
                if len(body) > max_bytes:
                    raise BodyTooLarge(max_bytes)
    except TimeoutError:
        raise RequestTimeout(f"The body did not arrive within {seconds:g} s") from None
    return bytes(body)


def check_length(request: Request, max_bytes: int) -> None:
    """Raises BodyTooLarge if Content-Length exceeds the limit."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > MAX_DIGITS or int(declared) > max_bytes):
        raise BodyTooLarge(max_bytes)


def parse_json(body: bytes) -> Any:
    """Parses JSON. Accepts NaN and Infinity, so that the error of the schema names the field."""
    try:
        return _DECODER.decode(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise MalformedJSON from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Converts the pairs of a JSON object. Raises InvalidRequest if a name occurs more than once."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        duplicate = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise InvalidRequest(
            [{"loc": ["body", _printable(duplicate)], "msg": "Field occurs more than once. Send it once"}]
        )
    return fields


def _parse_int(digits: str) -> int | float:
    """Parses an integer. More than MAX_DIGITS digits give infinity, which no field permits."""
    return int(digits) if len(digits) <= MAX_DIGITS else float(digits)


_DECODER = json.JSONDecoder(parse_int=_parse_int, object_pairs_hook=_unique)


def _describe(error: ValidationError, schema: type[BaseModel]) -> list[dict[str, Any]]:
    """Returns the location and message of each error.

    Mistyped names of fields are first, because they explain why other fields are missing.
    """
    mistyped, others = list[dict[str, Any]](), list[dict[str, Any]]()
    for kind, location, message in problems_of(error):
        intended = None
        if kind == "model_type":
            message = NOT_AN_OBJECT  # pydantic's message would contain a class name.
        elif kind == "extra_forbidden":
            intended = nearest(str(location[-1]), _fields_at(schema, location[:-1]))
            message = f"{UNKNOWN_FIELD}. Did you mean {intended}?" if intended else UNKNOWN_FIELD
        described = {"loc": ["body", *(_printable(part) for part in location)], "msg": _printable(message)}
        (mistyped if intended else others).append(described)
    return mistyped + others


def _fields_at(schema: type[BaseModel], location: Iterable[int | str]) -> Iterable[str]:
    """Returns the names of the fields that an object at this location of a body can have."""
    kind: Any = schema
    for part in location:
        kind = get_args(kind)[0] if isinstance(part, int) else kind.model_fields[part].annotation
        if NoneType in get_args(kind):  # The field can be null.
            kind = get_args(kind)[0]
    return cast(type[BaseModel], kind).model_fields


def _printable(part: int | str) -> int | str:
    return part if isinstance(part, int) else part[:200].encode("utf-8", "backslashreplace").decode()


async def cancel_on_disconnect(request: Request, work: Awaitable[T]) -> T:
    """Returns the result of the work. If the client disconnects first, cancels the work and raises ClientGoneError."""
    working = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(_wait_for_disconnect(request))
    disconnect.add_done_callback(lambda _: working.cancel())
    try:
        return await working
    except asyncio.CancelledError:
        if disconnect.done():
            raise ClientGoneError from None
        raise
    finally:
        working.cancel()
        disconnect.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
