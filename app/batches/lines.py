"""Reads the lines of an input file: `{"custom_id", "method", "url", "body"}`, one JSON object a line.

Lines are checked while the file is read. The memory has one line at a time, and a digest of each custom_id.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from app.batches.records import BatchError

MAX_LINE_BYTES = 8 * 1024 * 1024  # twice the default limit of a body with pictures (UNFOG_MAX_IMAGE_BYTES)
MAX_CUSTOM_ID = 512  # characters
MAX_VALUES = 20_000  # of a line, approximately; parsing millions of them would block all threads for seconds
MAX_BLANK_LINES = 100_000
MAX_ERRORS = 100  # of a file; reading ends after them
FIELDS = {"custom_id", "method", "url", "body"}
INVALID_JSON = "The line is not valid JSON in UTF-8, or is nested too deeply"
MAX_IMAGES = 64  # the largest number of images that `num_images_of` assumes
_COUNT = re.compile(rb'"(?:n|count)":\s*([0-9]{1,9})[0-9]*[,}\s]')


@dataclass(frozen=True, slots=True)
class InputLine:
    """A line that is valid, except for the fields in its body. `body` is JSON."""

    number: int
    custom_id: str
    body: bytes


class LineError(Exception):
    """A line is invalid."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


class InputReader:
    """Reads the lines of one file. `errors` has the errors that were found so far."""

    def __init__(self, endpoint: str | None, max_lines: int, endpoints: Collection[str]) -> None:
        """`endpoint` is the url of all lines. None: it is that of the first line, which must be in `endpoints`."""
        self.endpoint, self.errors = endpoint, list[BatchError]()
        self.num_lines = 0  # without empty lines
        self._max_lines, self._endpoints = max_lines, endpoints
        self._ids = set[bytes]()

    def read(self, blocks: Iterable[bytes]) -> Iterator[InputLine]:
        """Yields the valid lines. Ends early after MAX_ERRORS errors, or after too many lines."""
        for number, text in split_lines(blocks):
            is_blank = text is not None and not text.strip()
            self.num_lines += not is_blank
            if self.num_lines > self._max_lines or number > self._max_lines + MAX_BLANK_LINES:
                self._add("too_many_lines", None, f"The file has more than {self._max_lines} lines. Split it")
                return
            if is_blank:
                continue
            try:
                yield self._check(number, text)
            except LineError as error:
                self._add(error.code, number, error.message, error.param)
                if len(self.errors) == MAX_ERRORS:
                    return
        if not self.num_lines:
            self._add("empty_file", None, "The file has no lines")

    def _check(self, number: int, text: bytes | None) -> InputLine:
        if text is None:
            raise LineError("line_too_long", f"The line has more than {MAX_LINE_BYTES} bytes")
        if sum(text.count(sign) for sign in (b"[", b"{", b",")) > MAX_VALUES:
            raise LineError("too_many_values", f"The line has more than {MAX_VALUES} values")
        line = _parse(text)
        custom_id = line["custom_id"]
        digest = blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if digest in self._ids:
            raise LineError("duplicate_custom_id", f"Another line has the custom_id {custom_id[:80]!r}", "custom_id")
        self._ids.add(digest)
        url = line["url"]
        if self.endpoint is None and isinstance(url, str) and url in self._endpoints:
            self.endpoint = url
        if url is None or url != self.endpoint:
            wanted = self.endpoint or "one of " + ", ".join(sorted(self._endpoints))
            raise LineError("mismatched_url", f"The url must be {wanted}", "url")
        return InputLine(number, custom_id, _dumps(line["body"]))

    def _add(self, code: str, line: int | None, message: str, param: str | None = None) -> None:
        self.errors.append(BatchError(code, line, message, param))


def split_lines(blocks: Iterable[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """Yields the number and the bytes of each line. The bytes of a line that is too long are None.

    A byte order mark before the first line is skipped.
    """
    number, parts, size = 1, list[bytes](), 0
    for block in blocks:
        for i, piece in enumerate(block.split(b"\n")):
            if i:  # The newline before this piece ends a line.
                yield number, _joined(number, parts, size)
                number, parts, size = number + 1, [], 0
            size += len(piece)
            if size <= MAX_LINE_BYTES:
                parts.append(piece)
            else:
                parts.clear()
    if size:
        yield number, _joined(number, parts, size)


def _joined(number: int, parts: list[bytes], size: int) -> bytes | None:
    if size > MAX_LINE_BYTES:
        return None
    line = b"".join(parts)
    return line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _parse(text: bytes) -> dict[str, Any]:
    """Returns the fields of a line. Raises LineError."""
    try:
        document = text.decode("utf-8")
        line = json.loads(document, parse_int=_parse_int, parse_constant=_refuse, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, _DuplicateError):
            raise LineError("duplicate_field", f"The field {error.args[0][:80]!r} occurs more than once") from error
        raise LineError("invalid_json", INVALID_JSON) from error
    if not isinstance(line, dict):
        raise LineError("invalid_line", "The line is not a JSON object")
    if unknown := sorted(line.keys() - FIELDS):
        raise LineError("unknown_field", f"Unknown field {unknown[0][:80]!r}. A line has {_names()}")
    if missing := sorted(FIELDS - line.keys()):
        raise LineError("missing_field", f"The field {missing[0]!r} is missing. A line has {_names()}", missing[0])
    custom_id = line["custom_id"]
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
        raise LineError("invalid_custom_id", f"custom_id must have 1 to {MAX_CUSTOM_ID} characters", "custom_id")
    if not _is_unicode(custom_id) or "\0" in custom_id:
        raise LineError("invalid_custom_id", "custom_id has characters that are not permitted", "custom_id")
    if line["method"] != "POST":
        raise LineError("invalid_method", "method must be POST", "method")
    if not isinstance(line["body"], dict):
        raise LineError("invalid_body", "body must be a JSON object", "body")
    return line


def num_images_of(body: bytes) -> int:
    """Returns how many images a line will probably have: its `n` or `count`, at most MAX_IMAGES.

    It does not parse the body, because that would block the event loop if the body has pictures.
    """
    found = _COUNT.search(body)
    return min(max(int(found[1]), 1), MAX_IMAGES) if found else 1


class _DuplicateError(ValueError):
    """A name occurs more than once in an object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict[str, Any]()
    for name, value in pairs:
        if name in fields:
            raise _DuplicateError(name)
        fields[name] = value
    return fields


def _dumps(body: dict[str, Any]) -> bytes:
    """Returns a body as JSON in UTF-8. Only a body with lone surrogates has escapes, which make it longer."""
    try:
        return json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(body, separators=(",", ":")).encode()
    except RecursionError as error:
        raise LineError("invalid_json", INVALID_JSON) from error


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _parse_int(digits: str) -> int | float:
    """Parses an integer. Many digits give infinity, which no field permits: int() takes quadratic time."""
    return int(digits) if len(digits) <= 400 else float(digits)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _names() -> str:
    return "custom_id, method, url and body"
