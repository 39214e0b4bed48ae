"""Reads requests: parses the body, chooses the response format from Accept, and detects disconnected clients."""

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, TypeVar, cast, get_args

from fastapi import Request
from pydantic import BaseModel, ValidationError

from app.api.spelling import nearest
from app.errors import (
    BodyTooLarge,
    InvalidRequest,
    MalformedJSON,
    NotAcceptable,
    RequestTimeout,
    UnsupportedMediaType,
)

MAX_UNKNOWN_FIELDS = 32  # limit of unknown fields that an error lists; a body can have more
NOT_AN_OBJECT = "Input should be an object"
UNKNOWN_FIELD = "Unknown field"
OWN_PREFIX = "Value error, "  # pydantic adds it to the messages of our own validators
MAX_DIGITS = 400  # limit of digits of a JSON integer; a longer integer is parsed as a float

# An Accept header with text/html selects these types only if it allows no other one, because browsers (image/webp) and
# Java's HttpURLConnection (image/gif) name them in such headers by default. They get the format that */* selects.
_NAMED_BY_DEFAULT = ("image/webp", "image/gif")

_WHITESPACE = " \t"
_TOKEN = frozenset("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz")
_WEIGHT = frozenset("0123456789.")

Weights = dict[tuple[str, bool], float]  # (media range, True if it has no parameters) -> q value

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
    body = bytearray()
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > MAX_DIGITS or int(declared) > max_bytes):
        raise BodyTooLarge(max_bytes)
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
    """Returns the location and message of each error, without the input, which can be invalid Unicode.

    Mistyped names of fields are first, because they explain why other fields are missing.
    """
    mistyped, others = list[dict[str, Any]](), list[dict[str, Any]]()
    for item in error.errors(include_url=False, include_input=False, include_context=False):
        location, message = item["loc"], item["msg"].removeprefix(OWN_PREFIX)
        intended = None
        if item["type"] == "model_type":
            message = NOT_AN_OBJECT  # pydantic's message would contain a class name.
        elif item["type"] == "extra_forbidden":
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
    return cast(type[BaseModel], kind).model_fields


def _printable(part: int | str) -> int | str:
    return part if isinstance(part, int) else part[:200].encode("utf-8", "backslashreplace").decode()


def negotiate(request: Request, available: tuple[str, ...]) -> str:
    """Returns the media type of the response. Raises NotAcceptable if the Accept headers allow none."""
    best = _known_best_match(tuple(request.headers.getlist("accept")), available)
    if best is None:
        raise NotAcceptable(available)
    return best


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


def best_match(headers: Iterable[str], available: Sequence[str]) -> str | None:
    """Returns the available type that the Accept headers prefer, or None if they allow none (RFC 9110, section 12.5.1).

    The q value of a type comes from the most specific range that matches it. The type with the highest q value is
    chosen. If q values are equal, the more specific range is preferred, and then the first available type. Malformed
    members are ignored. If the headers name text/html, the types in _NAMED_BY_DEFAULT are chosen only if no other one
    is allowed. The time is linear in the length of the headers.
    """
    members = [member for header in headers for member in _split(header.lower(), ",") if member]
    weights: Weights = {}
    for member in members or ["*/*"]:
        _add(member, weights)
    ranks = {media_type: _rank(media_type, weights) for media_type in available}
    allowed = [media_type for media_type, (weight, _) in ranks.items() if weight]
    if ("text/html", True) in weights:
        allowed = [media_type for media_type in allowed if media_type not in _NAMED_BY_DEFAULT] or allowed
    return max(allowed, key=ranks.__getitem__, default=None)


_known_best_match = lru_cache(maxsize=64)(best_match)  # Most clients send one of a few Accept headers.


def _rank(media_type: str, weights: Weights) -> tuple[float, int]:
    """Returns the q value of a type, and how specific the matching range is (greater is more specific).

    The available types have no parameters. A range with parameters counts only if the same range is not present without
    parameters.
    """
    ranges = (media_type, f"{media_type.partition('/')[0]}/*", "*/*")
    keys = [(media_range, plain) for media_range in ranges for plain in (True, False)]
    for i, key in enumerate(keys):
        if key in weights:
            return weights[key], -i
    return 0.0, -len(keys)


def _add(member: str, weights: Weights) -> None:
    """Adds a media range unless it is malformed. If a range occurs twice, the first one counts."""
    media_range, *parameters = _split(member, ";")
    if media_range == "*":  # Java's HttpURLConnection sends this invalid range
        media_range = "*/*"
    kind, _, subtype = media_range.partition("/")
    if not (_is_token(kind) and _is_token(subtype)) or (kind == "*" and subtype != "*"):
        return
    plain, weight = True, 1.0
    for parameter in filter(None, parameters):
        name, _, value = parameter.partition("=")
        if name.rstrip(_WHITESPACE) == "q":  # parameters after q do not belong to the range
            weight = _parse_weight(value.lstrip(_WHITESPACE))
            break
        plain = False
    if 0 <= weight <= 1:
        weights.setdefault((media_range, plain), weight)


def _split(text: str, separator: str) -> list[str]:
    """Splits at separators outside of quoted strings. An unclosed quoted string ends with the text."""
    if '"' not in text:
        return [part.strip(_WHITESPACE) for part in text.split(separator)]
    parts, start, quoted, escaped = [], 0, False, False
    for i, character in enumerate(text):
        if escaped:
            escaped = False
        elif quoted and character == "\\":
            escaped = True
        elif character == '"':
            quoted = not quoted
        elif character == separator and not quoted:
            parts.append(text[start:i])
            start = i + 1
    return [part.strip(_WHITESPACE) for part in (*parts, text[start:])]


def _is_token(text: str) -> bool:
    return bool(text) and _TOKEN.issuperset(text)


def _parse_weight(text: str) -> float:
    """Returns the q value, or -1 if the text is malformed."""
    try:
        return float(text) if _WEIGHT.issuperset(text) else -1.0
    except ValueError:
        return -1.0
