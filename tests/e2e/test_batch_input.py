"""Invalid uploads and input files, and files and batches of other users, over HTTP."""

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.batch_client import FEW_STEPS, Batches, drawings, jsonl, line
from tests.e2e.conftest import Connect, Start, start_service
from tests.e2e.process import TIMEOUT
from tests.e2e.service import INTERNAL_DETAILS

KEYS = ["a-key-of-some-length-1", "a-key-of-some-length-2"]
MAX_LINES, MAX_FILE_BYTES = 5, 12 * 1024 * 1024
MEGABYTE = 1024 * 1024
BODY = {"prompt": "7", **FEW_STEPS}
LINE = json.dumps(line("a", BODY)).encode()


@pytest.fixture(scope="module")
def batches(checkpoint: Path) -> Iterator[Batches]:
    limits = {"UNFOG_MAX_LINES": str(MAX_LINES), "UNFOG_MAX_FILE_BYTES": str(MAX_FILE_BYTES)}
    with ExitStack() as stack:
        yield stack.enter_context(closing(Batches(start_service(stack, checkpoint, **limits))))


@pytest.fixture(scope="module")
def users(checkpoint: Path) -> Iterator[tuple[Batches, Batches]]:
    """Two users of one service."""
    with ExitStack() as stack:
        service = start_service(stack, checkpoint, UNFOG_API_KEYS=",".join(KEYS))
        first, second = (stack.enter_context(closing(Batches(service, key))) for key in KEYS)
        yield first, second


def with_fields(**fields: Any) -> bytes:
    return json.dumps({**line("a", BODY), **fields}).encode()


@pytest.mark.parametrize(
    ("content", "code", "number"),
    [
        (b'{"custom_id": "a"', "invalid_json", 1),
        (b"[]", "invalid_line", 1),
        (LINE + b"\n\nnull\n", "invalid_line", 3),
        (LINE + b"\n" + LINE, "duplicate_custom_id", 2),
        (b'{"custom_id": "a", "custom_id": "b"}', "duplicate_field", 1),
        (with_fields(unknown=1), "unknown_field", 1),
        (b'{"custom_id": "a", "method": "POST", "body": {}}', "missing_field", 1),
        (with_fields(custom_id=1), "invalid_custom_id", 1),
        (with_fields(custom_id="a" * 513), "invalid_custom_id", 1),
        (with_fields(custom_id="\0"), "invalid_custom_id", 1),
        (with_fields(custom_id="\ud800"), "invalid_custom_id", 1),
        (with_fields(method="GET"), "invalid_method", 1),
        (with_fields(body=[]), "invalid_body", 1),
        (with_fields(url="/generate"), "mismatched_url", 1),
        (LINE + b"\n" + with_fields(custom_id="b", url="/generate"), "mismatched_url", 2),
        (with_fields(body={"prompt": "7" * 9 * MEGABYTE}), "line_too_long", 1),
        (LINE + b"\n" + 9 * MEGABYTE * b"[", "line_too_long", 2),
        (b"\xff", "invalid_json", 1),
        (100_000 * b"[", "too_many_values", 1),
        (b"\n \r\n", "empty_file", None),
        (jsonl(drawings(MAX_LINES + 1)), "too_many_lines", None),
    ],
)
def test_batch_of_an_invalid_file_fails_and_names_the_line(
    batches: Batches, content: bytes, code: str, number: int | None
) -> None:
    batch = batches.end_of(batches.create(content))
    assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
    assert batch.failed_at
    assert batch.errors and batch.errors.data
    error = batch.errors.data[0]
    assert (error.code, error.line) == (code, number)
    assert error.message
    assert not INTERNAL_DETAILS.search(error.message)
    assert batch.request_counts and batch.request_counts.completed == 0


def test_file_with_a_byte_order_mark_and_without_a_last_newline_is_valid(batches: Batches) -> None:
    content = b"\xef\xbb\xbf" + LINE + b"\r\n\r\n" + with_fields(custom_id="b")
    batch = batches.end_of(batches.create(content))
    assert batch.status == "completed"
    answers, _ = batches.results(batch)
    assert [each["custom_id"] for each in answers] == ["a", "b"]


def test_file_of_the_largest_permitted_size_is_stored(batches: Batches) -> None:
    file = batches.upload(MAX_FILE_BYTES * b"x")
    assert file.bytes == MAX_FILE_BYTES
    batches.client.files.delete(file.id)


def test_file_that_is_too_large_is_refused_and_not_kept(batches: Batches) -> None:
    before = [each.id for each in batches.client.files.list()]
    with pytest.raises(openai.APIStatusError) as refused:
        batches.upload((MAX_FILE_BYTES + 1) * b"x")
    assert (refused.value.status_code, refused.value.code) == (413, "body_too_large")
    assert [each.id for each in batches.client.files.list()] == before


def head_of_upload(batches: Batches, framing: str) -> bytes:
    host, port = batches.service.address
    return (
        f"POST /v1/files HTTP/1.1\r\nHost: {host}:{port}\r\n{framing}\r\n"
        "Content-Type: multipart/form-data; boundary=bound\r\n\r\n"
    ).encode()


PURPOSE = b'--bound\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
FILE = b'--bound\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'


def test_content_length_above_the_limit_is_refused_before_the_body(batches: Batches) -> None:
    with socket.create_connection(batches.service.address, TIMEOUT) as connection:
        connection.sendall(head_of_upload(batches, f"Content-Length: {2 * MAX_FILE_BYTES}"))
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_chunked_file_that_is_too_large_is_refused_while_it_arrives(batches: Batches) -> None:
    def content() -> Iterator[bytes]:
        yield PURPOSE + FILE
        for _ in range(MAX_FILE_BYTES // MEGABYTE + 1):
            yield MEGABYTE * b"x"
        yield b"\r\n--bound--\r\n"

    before = [each.id for each in batches.client.files.list()]
    response = upload_in_chunks(batches, content())
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"
    assert [each.id for each in batches.client.files.list()] == before


def test_chunked_file_is_stored(batches: Batches) -> None:
    content = jsonl(drawings(3))

    def chunks() -> Iterator[bytes]:
        body = PURPOSE + FILE + content + b"\r\n--bound--\r\n"
        for start in range(0, len(body), 7):
            yield body[start : start + 7]

    response = upload_in_chunks(batches, chunks())
    assert response.status_code == 200, response.text
    assert batches.client.files.content(response.json()["id"]).content == content


def upload_in_chunks(batches: Batches, chunks: Iterator[bytes]) -> httpx.Response:
    """Sends a body in multipart/form-data without Content-Length."""
    headers = {"content-type": "multipart/form-data; boundary=bound"}
    return batches.service.client.post("/v1/files", content=chunks, headers=headers)


def test_upload_whose_client_disconnects_is_not_kept(batches: Batches) -> None:
    before = [each.id for each in batches.client.files.list()]
    with socket.create_connection(batches.service.address, TIMEOUT) as connection:
        head = head_of_upload(batches, f"Content-Length: {10 * MEGABYTE}")
        connection.sendall(head + PURPOSE + FILE + 3 * MEGABYTE * b"x")
    batches.upload(drawings(1))
    found = [each.id for each in batches.client.files.list()]
    assert len(found) == len(before) + 1


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "malformed_json"),
        (b"[]", "invalid_request"),
        (b"{}", "invalid_request"),
        (b"x" * 100_000, "body_too_large"),
    ],
)
def test_invalid_body_of_a_batch_has_an_error_in_the_format_of_openai(batches: Batches, body: bytes, code: str) -> None:
    response = batches.service.client.post("/v1/batches", content=body, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert error["code"] == code
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", ["/v1/files/%00", "/v1/files/a%20b/content", "/v1/batches/" + "a" * 5000])
def test_strange_ids_are_not_found(batches: Batches, path: str) -> None:
    response = batches.service.client.get(path)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")


def test_files_and_batches_of_another_user_are_not_found(users: tuple[Batches, Batches]) -> None:
    first, second = users
    batch = first.end_of(first.create(drawings(2)))
    assert batch.output_file_id
    files, batches = second.client.files, second.client.batches
    for file_id in (batch.input_file_id, batch.output_file_id):
        for call in (files.retrieve, files.content, files.delete):
            with pytest.raises(openai.NotFoundError):
                call(file_id)
        with pytest.raises(openai.BadRequestError) as refused:
            files.list(after=file_id)
        assert refused.value.param == "after"
    for use in (batches.retrieve, batches.cancel):
        with pytest.raises(openai.NotFoundError):
            use(batch.id)
    with pytest.raises(openai.BadRequestError) as refused:
        batches.list(after=batch.id)
    assert refused.value.param == "after"
    with pytest.raises(openai.BadRequestError) as refused:
        batches.create(input_file_id=batch.input_file_id, endpoint="/v1/images/generations", completion_window="24h")
    assert refused.value.param == "input_file_id"
    assert (list(files.list()), list(batches.list())) == ([], [])
    for name in ("images.zip", "images.parquet"):
        path = f"/batches/{batch.id}/{name}"
        assert get(second, path).status_code == 404
        assert get(first, path).status_code == 200
    assert first.results(batch)[0]
    assert {each.id for each in first.client.files.list()} == {batch.input_file_id, batch.output_file_id}


def get(batches: Batches, path: str) -> httpx.Response:
    return batches.service.client.get(path, headers={"authorization": f"Bearer {batches.client.api_key}"})


def test_running_batch_cannot_be_cancelled_by_another_user(users: tuple[Batches, Batches]) -> None:
    first, second = users
    batch = first.create([line(str(number), {"prompt": "7", "n": 10}) for number in range(500)])
    first.wait_for(batch, {"in_progress"})
    with pytest.raises(openai.NotFoundError):
        second.client.batches.cancel(batch.id)
    assert first.get(batch).status == "in_progress"
    first.client.batches.cancel(batch.id)
    assert first.end_of(batch).status == "cancelled"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/files"),
        ("POST", "/v1/files"),
        ("GET", "/v1/files/file-0"),
        ("DELETE", "/v1/files/file-0"),
        ("GET", "/v1/files/file-0/content"),
        ("GET", "/v1/batches"),
        ("POST", "/v1/batches"),
        ("GET", "/v1/batches/batch_0"),
        ("POST", "/v1/batches/batch_0/cancel"),
        ("GET", "/batches/batch_0/images.zip"),
        ("GET", "/batches/batch_0/images.parquet"),
    ],
)
def test_every_route_needs_a_key(users: tuple[Batches, Batches], method: str, path: str) -> None:
    client = users[0].service.client
    assert client.request(method, path).status_code == 401
    assert client.request(method, path, headers={"x-api-key": "wrong"}).status_code == 403


def test_quota_is_that_of_one_user(start: Start, connect: Connect) -> None:
    service = start(UNFOG_API_KEYS=",".join(KEYS), UNFOG_MAX_FILES="1")
    first, second = (connect(service, key) for key in KEYS)
    first.upload(drawings(1))
    with pytest.raises(openai.PermissionDeniedError):
        first.upload(drawings(1))
    file = second.upload(drawings(1))
    assert [each.id for each in second.client.files.list()] == [file.id]
