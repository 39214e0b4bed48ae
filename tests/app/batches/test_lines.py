import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.batches import lines
from app.batches.lines import InputLine, InputReader, LineError, num_images_of, split_lines
from tests.app.batches.store import ENDPOINT, OTHER_ENDPOINT, content_of, line_of

ENDPOINTS = {ENDPOINT, OTHER_ENDPOINT}
GOOD = {"custom_id": "a", "method": "POST", "url": ENDPOINT, "body": {"prompt": "7"}}


def read(
    *blocks: bytes, endpoint: str | None = ENDPOINT, max_lines: int = 100
) -> tuple[list[InputLine], list[tuple[str, int | None]], InputReader]:
    """Returns the valid lines, and the code and line of each error."""
    reader = InputReader(endpoint, max_lines, ENDPOINTS)
    found = list(reader.read(blocks))
    return found, [(error.code, error.line) for error in reader.errors], reader


def changed(**fields: Any) -> bytes:
    return json.dumps(GOOD | fields).encode()


def without(name: str) -> bytes:
    return json.dumps({key: value for key, value in GOOD.items() if key != name}).encode()


def test_lines_are_read_with_their_numbers_and_bodies() -> None:
    found, errors, reader = read(line_of("a", prompt="7", n=2), b"\n", line_of("b", prompt="ü"))
    assert [(line.number, line.custom_id, json.loads(line.body)) for line in found] == [
        (1, "a", {"prompt": "7", "n": 2}),
        (3, "b", {"prompt": "ü"}),
    ]
    assert (errors, reader.num_lines) == ([], 2)


@pytest.mark.parametrize(
    ("text", "code", "param"),
    [
        (b"{", "invalid_json", None),
        (b"nonsense", "invalid_json", None),
        (b'{"custom_id": "\xff"}', "invalid_json", None),
        (json.dumps(GOOD).encode() + b" {}", "invalid_json", None),
        (changed(body={"guidance": float("nan")}), "invalid_json", None),
        (changed(body={"guidance": float("-inf")}), "invalid_json", None),
        (b"[" * 10_000 + b"]" * 10_000, "invalid_json", None),
        (b"[" * 100_000 + b"]" * 100_000, "too_many_values", None),
        (changed(body={"x": [0] * 30_000}), "too_many_values", None),
        (changed(body={"x": [{}] * 30_000}), "too_many_values", None),
        (b"[]", "invalid_line", None),
        (b"null", "invalid_line", None),
        (b'"text"', "invalid_line", None),
        (changed(extra=1), "unknown_field", None),
        (changed(**{"\ud800\0": 1}), "unknown_field", None),
        (without("custom_id"), "missing_field", "custom_id"),
        (without("method"), "missing_field", "method"),
        (without("url"), "missing_field", "url"),
        (without("body"), "missing_field", "body"),
        (b'{"custom_id": "a", "custom_id": "b"}', "duplicate_field", None),
        (b'{"body": {"n": 1, "n": 2}}', "duplicate_field", None),
        (changed(custom_id=""), "invalid_custom_id", "custom_id"),
        (changed(custom_id="x" * 513), "invalid_custom_id", "custom_id"),
        (changed(custom_id=7), "invalid_custom_id", "custom_id"),
        (changed(custom_id="a\0"), "invalid_custom_id", "custom_id"),
        (changed(custom_id="a\ud800"), "invalid_custom_id", "custom_id"),
        (changed(method="GET"), "invalid_method", "method"),
        (changed(method=["POST"]), "invalid_method", "method"),
        (changed(url=OTHER_ENDPOINT), "mismatched_url", "url"),
        (changed(url="/v1/unknown"), "mismatched_url", "url"),
        (changed(url=[ENDPOINT]), "mismatched_url", "url"),
        (changed(body=None), "invalid_body", "body"),
        (changed(body=[]), "invalid_body", "body"),
        (changed(body="{}"), "invalid_body", "body"),
    ],
)
def test_invalid_line_is_an_error_and_the_other_lines_are_read(text: bytes, code: str, param: str | None) -> None:
    found, _, reader = read(line_of("first") + text + b"\n" + line_of("last"))
    assert [line.custom_id for line in found] == ["first", "last"]
    (error,) = reader.errors
    assert (error.code, error.line, error.param) == (code, 2, param)
    error.message.encode()  # has no lone surrogates
    assert "\0" not in error.message


def test_second_line_with_a_custom_id_is_an_error() -> None:
    _, errors, _ = read(line_of("a") + line_of("b") + line_of("a"))
    assert errors == [("duplicate_custom_id", 3)]


@pytest.mark.parametrize("url", [None, ["list"], {}, 1, "/v1/unknown"])
def test_first_url_must_be_permitted_if_no_endpoint_is_given(url: Any) -> None:
    _, errors, _ = read(changed(url=url), endpoint=None)
    assert errors == [("mismatched_url", 1)]


def test_first_line_decides_the_url_if_no_endpoint_is_given() -> None:
    _, errors, reader = read(line_of("a", url=OTHER_ENDPOINT) + line_of("b"), endpoint=None)
    assert (reader.endpoint, errors) == (OTHER_ENDPOINT, [("mismatched_url", 2)])


def test_file_with_the_largest_number_of_lines_is_valid() -> None:
    assert read(content_of(3) + b"\n\n", max_lines=3)[1] == []


def test_reading_ends_after_too_many_lines() -> None:
    found, errors, _ = read(content_of(4), b"not read", max_lines=3)
    assert (len(found), errors) == (3, [("too_many_lines", None)])


def test_reading_ends_after_too_many_blank_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_BLANK_LINES", 5)
    found, errors, _ = read(b"\n" * 7 + line_of("a") + b"\n" * 100, max_lines=3)
    assert (len(found), errors) == (1, [("too_many_lines", None)])


def test_reading_ends_after_many_errors() -> None:
    _, errors, reader = read(b"{\n" * 1000, max_lines=2000)
    assert (len(errors), reader.num_lines) == (lines.MAX_ERRORS, lines.MAX_ERRORS)


@pytest.mark.parametrize("content", [b"", b"\n", b"\n \r\n\t\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n\n"])
def test_file_without_lines_is_an_error(content: bytes) -> None:
    assert read(content)[1] == [("empty_file", None)]
    assert read()[1] == [("empty_file", None)]


@pytest.mark.parametrize(
    "content",
    [
        content_of(3).replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + content_of(3),
        content_of(3).rstrip(b"\n"),
        content_of(3) + b"\n\n",
    ],
    ids=["CRLF", "byte order mark", "no newline at the end", "blank lines at the end"],
)
def test_files_of_other_programs_are_read(content: bytes) -> None:
    found, errors, _ = read(content)
    assert ([line.custom_id for line in found], errors) == (["c1", "c2", "c3"], [])


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_line_that_is_too_long_is_an_error_wherever_blocks_end(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    limit = len(line_of("a", prompt="x" * 100)) - 1
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", limit)
    content = line_of("a", prompt="x" * 100) + line_of("b", prompt="x" * 101) + line_of("c")
    found, errors, _ = read(*(content[start : start + block] for start in range(0, len(content), block)))
    assert [line.custom_id for line in found] == ["a", "c"]
    assert errors == [("line_too_long", 2)]


def test_last_line_that_is_too_long_is_an_error_without_a_newline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 10)
    assert list(split_lines([b"a\n", b"x" * 6, b"x" * 6])) == [(1, b"a"), (2, None)]


@given(st.lists(st.binary(max_size=8).map(lambda text: text.replace(b"x", b"\n"))))
def test_lines_do_not_depend_on_where_blocks_end(blocks: list[bytes]) -> None:
    content = b"".join(blocks)
    expected = list(enumerate(content.split(b"\n"), 1))
    if expected[-1][1] == b"":
        del expected[-1]  # after the last newline
    assert list(split_lines(blocks)) == [
        (number, text.removeprefix(b"\xef\xbb\xbf") if number == 1 else text) for number, text in expected
    ]


@given(
    st.dictionaries(
        st.text(), st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5)
    )
)
def test_body_is_unchanged_json_in_one_line(body: dict[str, Any]) -> None:
    (line,), _, _ = read(changed(body=body))
    assert json.loads(line.body) == body
    assert b"\n" not in line.body


def test_long_numbers_are_read_quickly_and_become_infinite() -> None:
    digits = b"9" * 1_000_000
    (line,), _, _ = read(json.dumps(GOOD).encode().replace(b'"7"', digits + b', "seed": ' + b"1" * 300))
    assert json.loads(line.body) == {"prompt": float("inf"), "seed": int("1" * 300)}


def test_nested_lines_are_read_or_refused_at_every_depth() -> None:
    def nested(depth: int) -> bytes:
        return json.dumps(GOOD).encode().replace(b'"7"', b"[" * depth + b"]" * depth)

    limit = sys.getrecursionlimit()
    for depth in range(max(1, limit - 300), limit + 100):
        found, errors, _ = read(nested(depth))
        assert [line.custom_id for line in found] == ["a"] or errors == [("invalid_json", 1)]
        for line in found:
            assert deeper(60, lambda line=line: num_images_of(line.body)) == 1  # type: ignore[misc]


@pytest.mark.parametrize("text", ["é" * 1000, "\U0001f600", '\\ " \n \0'])
def test_stored_body_is_not_longer_than_the_line(text: str) -> None:
    line = json.dumps(GOOD | {"body": {"prompt": text}}, ensure_ascii=False).encode()
    (found,), errors, _ = read(line)
    assert (errors, json.loads(found.body)) == ([], {"prompt": text})
    assert len(found.body) < len(line)


def test_half_of_a_surrogate_pair_is_left_to_the_route() -> None:
    (found,), errors, _ = read(changed(body={"prompt": "\ud83d"}))
    assert (errors, json.loads(found.body)) == ([], {"prompt": "\ud83d"})


def deeper(frames: int, work: Callable[[], int]) -> int:
    """Calls a function with a deeper stack."""
    return deeper(frames - 1, work) if frames else work()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, 1),
        ({"n": 3}, 3),
        ({"count": 5}, 5),
        ({"n": 1000}, lines.MAX_IMAGES),
        ({"n": 10**300}, lines.MAX_IMAGES),
        ({"n": -5}, 1),
        ({"n": None}, 1),
        ({"n": "4"}, 1),
        ({"n": 2.5}, 1),
        ({"n": [1]}, 1),
        ({"prompt": '"n": 9,', "n": 4}, 4),
        ({"prompt": "7", "n": 4, "size": "28x28"}, 4),
    ],
)
def test_number_of_images_is_that_of_the_request(body: dict[str, Any], expected: int) -> None:
    assert num_images_of(json.dumps(body).encode()) == expected


def test_line_error_has_its_message() -> None:
    assert str(LineError("code", "what is wrong")) == "what is wrong"
