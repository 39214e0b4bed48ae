"""Chooses the format of an answer from the Accept headers (RFC 9110, section 12.5.1)."""

from collections.abc import Iterable, Sequence
from functools import lru_cache

from fastapi import Request

from app.api.http.media_types import GIF, WEBP
from app.errors import NotAcceptable

# An Accept header with text/html selects these types only if it allows no other one, because browsers (image/webp) and
# Java's HttpURLConnection (image/gif) name them in such headers by default. They get the format that */* selects.
_NAMED_BY_DEFAULT = (WEBP, GIF)

_WHITESPACE = " \t"
_TOKEN = frozenset("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz")
_WEIGHT = frozenset("0123456789.")

Weights = dict[tuple[str, bool], float]  # (media range, True if it has no parameters) -> q value


def negotiate(request: Request, available: tuple[str, ...]) -> str:
    """Returns the media type of the response. Raises NotAcceptable if the Accept headers allow none."""
    best = _known_best_match(tuple(request.headers.getlist("accept")), available)
    if best is None:
        raise NotAcceptable(available)
    return best


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
