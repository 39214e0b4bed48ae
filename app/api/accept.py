"""The Accept header (RFC 9110, section 12.5.1): which of several media types a client prefers."""

from collections.abc import Iterable, Sequence

_WHITESPACE = " \t"
_TOKEN = frozenset("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz")
_WEIGHT = frozenset("0123456789.")

Weights = dict[tuple[str, bool], float]  # (media range, True if it has no parameters) -> weight


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
