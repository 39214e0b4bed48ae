"""POST, GET and DELETE /v1/files. test_file_upload.py tests which bodies are stored."""

import asyncio
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import openai
import pytest
from starlette.requests import Request
from starlette.types import Message

from app import errors
from app.api.http.context import CLIENT_GONE, context_of
from app.api.openai.files import get_content
from app.batches.files import CHUNK_BYTES, NOT_FOUND
from app.batches.records import File
from tests.app.api.openai.batch_samples import KEYS, LINES, OTHER_KEY, Application, check, idle
from tests.app.api.openai.samples import error_of

__all__ = ["idle"]
pytestmark = pytest.mark.usefixtures("idle")
DAY = 24 * 3600


def test_client_of_openai_uploads_reads_lists_and_deletes_a_file(tmp_path: Path) -> None:
    async def checks(app: Application) -> None:
        files = app.openai.files
        created = await files.create(
            file=("lines.jsonl", LINES), purpose="batch", expires_after={"anchor": "created_at", "seconds": 7200}
        )
        assert (created.object, created.purpose, created.status) == ("file", "batch", "processed")
        assert (created.filename, created.bytes) == ("lines.jsonl", len(LINES))
        assert created.expires_at == created.created_at + 7200
        assert await files.retrieve(created.id) == created
        assert [each async for each in files.list()] == [created]
        assert (await files.content(created.id)).content == LINES
        deleted = await files.delete(created.id)
        assert (deleted.id, deleted.object, deleted.deleted) == (created.id, "file", True)
        with pytest.raises(openai.NotFoundError):
            await files.retrieve(created.id)
        assert [each async for each in files.list()] == []

    check(checks, tmp_path)


def test_file_expires_after_the_days_of_the_setting(tmp_path: Path) -> None:
    async def checks(app: Application) -> None:
        file = (await app.client.get(f"/v1/files/{await app.upload()}")).json()
        assert file["expires_at"] == file["created_at"] + 2 * DAY

    check(checks, tmp_path, file_days=2)


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_client_of_openai_lists_all_pages_in_both_orders(tmp_path: Path, order: Any) -> None:
    async def checks(app: Application) -> None:
        ids = [await app.upload(filename=f"{i}.jsonl") for i in range(5)]
        pages = [page async for page in (await app.openai.files.list(limit=2, order=order)).iter_pages()]
        assert [len(page.data) for page in pages] == [2, 2, 1]
        listed = [each.id for page in pages for each in page.data]
        assert listed == (ids if order == "asc" else ids[::-1])
        assert [page.has_more for page in pages] == [True, True, False]

    check(checks, tmp_path)


def test_list_has_its_ends_and_only_files_with_the_purpose(tmp_path: Path) -> None:
    async def checks(app: Application) -> None:
        empty = (await app.client.get("/v1/files")).json()
        assert empty == {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}
        first, second = await app.upload(), await app.upload()
        listed = (await app.client.get("/v1/files", params={"purpose": "batch"})).json()
        assert (listed["first_id"], listed["last_id"]) == (second, first)
        assert (await app.client.get("/v1/files", params={"purpose": "batch_output"})).json() == empty

    check(checks, tmp_path)


INVALID = [
    ({"limit": "0"}, "limit"),
    ({"limit": "10001"}, "limit"),
    ({"limit": "many"}, "limit"),
    ({"order": "newest"}, "order"),
    ({"after": "file-unknown"}, "after"),
    ({"after": "a\x00"}, "after"),
    ({"purpose": "a\x00"}, "purpose"),
]


@pytest.mark.parametrize(("query", "param"), INVALID)
def test_invalid_parameter_of_a_list_is_named(tmp_path: Path, query: dict[str, str], param: str) -> None:
    async def checks(app: Application) -> None:
        await app.upload()
        error = error_of(await app.client.get("/v1/files", params=query), 400, "invalid_request")
        assert error["param"] == param

    check(checks, tmp_path)


@pytest.mark.parametrize(("method", "suffix"), [("GET", ""), ("HEAD", ""), ("DELETE", ""), ("GET", "/content")])
def test_file_of_another_key_is_answered_like_an_unknown_one(tmp_path: Path, method: str, suffix: str) -> None:
    async def checks(app: Application) -> None:
        own = await app.upload(authorization=OTHER_KEY["authorization"])
        app.client.headers["authorization"] = "Bearer a-key-0123456789abcd"
        for file_id in (own, "file-unknown", "file%00", "file-%F0%9F%98%80", "a" * 65):
            answer = await app.client.request(method, f"/v1/files/{file_id}{suffix}")
            assert answer.status_code == 404
            if method != "HEAD":
                assert error_of(answer, 404, "not_found")["message"] == NOT_FOUND
        assert (await app.client.get("/v1/files")).json()["data"] == []
        error = error_of(await app.client.get("/v1/files", params={"after": own}), 400, "invalid_request")
        assert error["param"] == "after"
        assert (await app.client.get(f"/v1/files/{own}", headers=OTHER_KEY)).json()["id"] == own

    check(checks, tmp_path, **KEYS)


def test_errors_of_uploads_have_the_format_of_openai(tmp_path: Path) -> None:
    async def checks(app: Application) -> None:
        async def upload(content: bytes = LINES, purpose: str = "batch", **options: Any) -> Any:
            return await app.client.post("/v1/files", data={"purpose": purpose}, files={"file": content}, **options)

        assert error_of(await upload(purpose="fine-tune"), 400, "invalid_request")["param"] == "purpose"
        error_of(await upload(b"a" * 4097), 413, "body_too_large")
        error_of(await app.client.post("/v1/files", json={}), 415, "unsupported_media_type")
        error_of(await upload(headers={"content-type": "multipart/form-data"}), 400, "malformed_request")
        await app.upload()
        assert error_of(await upload(), 403, "quota_exceeded")["type"] == "permission_error"

    check(checks, tmp_path, max_file_bytes=4096, max_files=1)


@pytest.mark.parametrize(
    ("error", "code"), [(errors.StorageFull(), "storage_full"), (errors.StorageUnavailable(5), "storage_unavailable")]
)
def test_errors_of_the_database_are_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: errors.UnfogError, code: str
) -> None:
    async def checks(app: Application) -> None:
        def fail(*arguments: Any, **options: Any) -> Any:
            raise error

        file_id = await app.upload()
        for name in ("begin", "get", "list", "delete"):
            monkeypatch.setattr(app.batches.files, name, fail)
        requests = [("GET", ""), ("GET", f"/{file_id}"), ("DELETE", f"/{file_id}"), ("GET", f"/{file_id}/content")]
        answers = [await app.client.request(method, f"/v1/files{path}") for method, path in requests]
        files = {"file": LINES}
        answers.append(await app.client.post("/v1/files", data={"purpose": "batch"}, files=files))
        for answer in answers:
            error_of(answer, error.status, code)
            assert answer.headers.get("retry-after") == error.headers.get("Retry-After")

    check(checks, tmp_path)


def test_file_that_a_batch_reads_is_not_deleted(tmp_path: Path) -> None:
    async def checks(app: Application) -> None:
        file_id = await app.upload()
        batch_id = (await app.create(file_id)).json()["id"]
        error = error_of(await app.client.delete(f"/v1/files/{file_id}"), 409, "conflict")
        assert batch_id in error["message"]

    check(checks, tmp_path)


@pytest.mark.parametrize(
    ("filename", "disposition"),
    [
        ("lines-1.jsonl", 'attachment; filename="lines-1.jsonl"'),
        ('a "b";é.jsonl', "attachment; filename*=UTF-8''a%20%22b%22%3B%C3%A9.jsonl"),
        ("../a", "attachment; filename*=UTF-8''..%2Fa"),
    ],
)
def test_content_has_its_length_and_its_name_for_get_and_head(tmp_path: Path, filename: str, disposition: str) -> None:
    content = bytes(range(256)) * 5000  # more than a block

    async def checks(app: Application) -> None:
        path = f"/v1/files/{await app.upload(content, filename)}/content"
        for method in ("GET", "HEAD"):
            answer = await app.client.request(method, path)
            assert answer.status_code == 200
            assert answer.headers["content-type"] == "application/octet-stream"
            assert answer.headers["content-length"] == str(len(content))
            assert answer.headers["content-disposition"] == disposition
            assert answer.headers["cache-control"] == "no-store"
            assert answer.content == (content if method == "GET" else b"")

    check(checks, tmp_path)


def test_head_does_not_read_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def checks(app: Application) -> None:
        file_id = await app.upload()

        def content(*arguments: Any) -> Iterator[bytes]:
            raise AssertionError("the content was read")
            yield b""

        monkeypatch.setattr(app.batches.files, "content", content)
        assert (await app.client.head(f"/v1/files/{file_id}/content")).status_code == 200

    check(checks, tmp_path)


class Download:
    """Receives the content of a file without a socket, and keeps the messages."""

    def __init__(self, app: Application, file: File) -> None:
        self.scope: dict[str, Any] = {"type": "http", "path": "/v1/files", "headers": []}
        self.sent: list[Message] = []
        self.leaves, self.is_sent = asyncio.Event(), asyncio.Event()
        self.task = asyncio.create_task(self._run(app, file))

    async def _run(self, app: Application, file: File) -> None:
        response = await get_content(Request(self.scope), file.id, app.service)
        await response(self.scope, self._receive, self._send)

    async def _receive(self) -> Message:
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        self.sent.append(message)
        if message.get("body"):
            self.is_sent.set()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


async def file_of(app: Application, num_blocks: int) -> File:
    file_id = await app.upload(b"a" * CHUNK_BYTES * num_blocks)
    return await app.batches.database.run(app.batches.files.get, "", file_id)


def test_body_ends_with_the_last_byte(tmp_path: Path) -> None:
    """A client that has received it may disconnect. The access log would then call the response incomplete."""

    async def checks(app: Application) -> None:
        download = Download(app, await file_of(app, 3))
        await download.task
        assert [message.get("more_body") for message in download.sent] == [None, True, True, False]
        assert len(download.body) == 3 * CHUNK_BYTES
        assert context_of(download.scope).outcome is None

    check(checks, tmp_path)


def test_client_that_disconnects_ends_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def checks(app: Application) -> None:
        file, num_read = await file_of(app, 3), 0
        download = Download(app, file)
        content = app.batches.files.content

        def endless(*arguments: Any) -> Iterator[bytes]:
            nonlocal num_read
            (block, *_) = content(*arguments)
            while True:
                num_read += 1
                yield block

        monkeypatch.setattr(app.batches.files, "content", endless)
        await download.is_sent.wait()
        download.leaves.set()
        await download.task
        assert context_of(download.scope).outcome == CLIENT_GONE
        read = num_read
        await app.batches.database.run(lambda: None)
        assert num_read == read

    check(checks, tmp_path)


@pytest.mark.parametrize("num_sent", [0, 1])
def test_content_of_a_file_that_is_deleted_meanwhile_is_never_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_sent: int
) -> None:
    async def checks(app: Application) -> None:
        file = await file_of(app, 3)
        content = app.batches.files.content

        def deleted(*arguments: Any) -> Iterator[bytes]:
            blocks = content(*arguments)
            yield from islice(blocks, num_sent)
            app.batches.files.delete("", file.id)
            yield from blocks

        monkeypatch.setattr(app.batches.files, "content", deleted)
        download = Download(app, file)
        await download.task
        assert len(download.body) == num_sent * CHUNK_BYTES
        assert all(message.get("more_body") for message in download.sent[1:])
        assert context_of(download.scope).outcome == "not_found"

    check(checks, tmp_path)
