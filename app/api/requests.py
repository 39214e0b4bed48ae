"""Reading requests: the body, the answer format that Accept prefers, and whether the client is still connected."""

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Iterable, Sequence
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from app.errors import (
    BodyTooLarge,
    InvalidRequest,
    MalformedJSON,
    NotAcceptable,
    RequestTimeout,
    UnsupportedMediaType,
)

MAX_UNKNOWN_FIELDS = 32  # that an error lists; a body of 16 KiB can have more than a thousand
MAX_DIGITS = 400  # of an integer

_WHITESPACE = " \t"
_TOKEN = frozenset("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz")
_WEIGHT = frozenset("0123456789.")

Weights = dict[tuple[str, bool], float]  # (media range, True if it has no parameters) -> weight

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


class ClientGoneError(Exception):
    """The client closed the connection, so that no answer can be sent."""


async def read_json(request: Request, schema: type[M], max_bytes: int, seconds: float) -> M:
    """Returns the body as `schema`.

    Raises UnsupportedMediaType, BodyTooLarge, RequestTimeout, MalformedJSON or InvalidRequest.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaType
    document = _parse(await _read(request, max_bytes, seconds))
    if not isinstance(document, dict):  # pydantic's own message would name a class
        raise InvalidRequest([{"loc": ["body"], "msg": "Input should be an object"}])
    unknown = [name for name in document if name not in schema.model_fields]
    for name in unknown[MAX_UNKNOWN_FIELDS:]:
        del document[name]
    try:
        return schema.model_validate(document)
    except ValidationError as error:
        raise InvalidRequest(_describe(error)) from error


async def _read(request: Request, max_bytes: int, seconds: float) -> bytes:
    body = bytearray()
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > MAX_DIGITS or int(declared) > max_bytes):
        raise BodyTooLarge(max_bytes)
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise BodyTooLarge(max_bytes)
    except TimeoutError:
        raise RequestTimeout(f"the body took longer than {seconds:g} s") from None
    return bytes(body)


def _parse(body: bytes) -> Any:
    """Parses JSON. Accepts NaN and Infinity, so that the schema's error names the field. The body limit bounds time."""
    try:
        return json.loads(body.decode("utf-8"), parse_int=_parse_int, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise MalformedJSON from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns an object; InvalidRequest if a name occurs twice, since one of the two would be ignored."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise InvalidRequest([{"loc": ["body", _printable(twice)], "msg": "Field given more than once"}])
    return fields


def _parse_int(digits: str) -> int | float:
    """Returns an integer. One that is too long for Python's parser becomes infinity, since no field permits either."""
    return int(digits) if len(digits) <= MAX_DIGITS else float(digits)


def _describe(error: ValidationError) -> list[dict[str, Any]]:
    """Returns the place and the message of each error, without the input, which may not be valid text."""
    return [
        {"loc": ["body", *(_printable(part) for part in item["loc"])], "msg": _printable(item["msg"])}
        for item in error.errors(include_url=False, include_input=False, include_context=False)
    ]


def _printable(part: int | str) -> int | str:
    return part if isinstance(part, int) else part[:200].encode("utf-8", "backslashreplace").decode()


def negotiate(request: Request, available: tuple[str, ...]) -> str:
    """Returns the media type of the answer; NotAcceptable if the Accept headers allow none of them."""
    best = best_match(request.headers.getlist("accept"), available)
    if best is None:
        raise NotAcceptable(available)
    return best


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Returns the result of the work. If the client disconnects, cancels the work and raises ClientGoneError."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError
    finally:
        working.cancel()
        leaving.cancel()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def best_match(headers: Iterable[str], available: Sequence[str]) -> str | None:
    """Returns the available type that the Accept headers prefer, or None if they allow none of them.

    The most specific range decides about each type. Of several types, the one with the highest weight wins, then the
    one with the most specific range, then the first. Malformed members are ignored. The time is linear in the input.
    """
    members = [member for header in headers for member in _split(header.lower(), ",") if member]
    weights: Weights = {}
    for member in members or ["*/*"]:
        _add(member, weights)
    ranked = [(_rank(media_type, weights), media_type) for media_type in available]
    (weight, _), best = max(ranked, key=lambda pair: pair[0])
    return best if weight else None


def _rank(media_type: str, weights: Weights) -> tuple[float, int]:
    """Returns the weight of a type, and how specific the range is that gives the weight.

    Our types have no parameters. A range with parameters is used only if the same range without parameters is absent.
    """
    ranges = (media_type, f"{media_type.partition('/')[0]}/*", "*/*")
    keys = [(media_range, plain) for media_range in ranges for plain in (True, False)]
    for i, key in enumerate(keys):
        if key in weights:
            return weights[key], -i
    return 0.0, -len(keys)


def _add(member: str, weights: Weights) -> None:
    """Adds a media range unless it is malformed. The first of two equal ranges counts."""
    media_range, *parameters = _split(member, ";")
    if media_range == "*":  # sent by Java's HttpURLConnection
        media_range = "*/*"
    kind, _, subtype = media_range.partition("/")
    if not (_is_token(kind) and _is_token(subtype)) or (kind == "*" and subtype != "*"):
        return
    plain, weight = True, 1.0
    for parameter in filter(None, parameters):
        name, _, value = parameter.partition("=")
        if name.rstrip(_WHITESPACE) == "q":  # what follows the weight does not belong to the range
            weight = _parse_weight(value.lstrip(_WHITESPACE))
            break
        plain = False
    if 0 <= weight <= 1:
        weights.setdefault((media_range, plain), weight)


def _split(text: str, separator: str) -> list[str]:
    """Splits at the separators outside of quoted strings. A quoted string that is not closed ends with the text."""
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
    """Returns the weight; a number out of range if the text is malformed."""
    try:
        return float(text) if _WEIGHT.issuperset(text) else -1.0
    except ValueError:
        return -1.0
