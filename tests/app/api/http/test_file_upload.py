"""Tests of uploads with the real database: which bodies are stored, and that nothing is left of the others."""

import asyncio
import itertools
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from app import errors
from app.api.http import file_upload
from app.api.http.context import context_of
from app.api.http.file_upload import (
    FORM_BYTES,
    MAX_FILENAME,
    MAX_LIFETIME,
    MAX_TEXT_BYTES,
    MIN_LIFETIME,
    PIECE_BYTES,
    receive_file,
)
from app.batches import tables
from app.batches.database import Database
from app.batches.files import Files, Limits
from app.batches.records import File
from app.settings import Settings

BOUNDARY = "a-boundary"
FORM = f"multipart/form-data; boundary={BOUNDARY}"
LINES = b'{"custom_id": "1"}\n{"custom_id": "2"}\n'
DAY = 24 * 3600
LIMITS = Limits(files=3, file_bytes=4 * PIECE_BYTES, stored_bytes=8 * PIECE_BYTES, lines=100, lifetime=30 * DAY)
OWNER = "an-owner"

Part = tuple[str, str | None, bytes]  # the name of the field, of the file, and the content
PURPOSE: Part = ("purpose", None, b"batch")
ANCHOR: Part = ("expires_after[anchor]", None, b"created_at")
SECONDS: Part = ("expires_after[seconds]", None, b"7200")
FILE: Part = ("file", "lines.jsonl", LINES)


def body_of(*parts: Part) -> bytes:
    body = b""
    for name, filename, content in parts:
        of_file = f'; filename="{filename}"' if filename is not None else ""
        body += f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{of_file}\r\n\r\n'.encode()
        body += content + b"\r\n"
    return body + f"--{BOUNDARY}--\r\n".encode()


class Store:
    """A database in a folder, and uploads to it."""

    def __init__(self, folder: Path, limits: Limits = LIMITS) -> None:
        self.database = Database(folder)
        self.files = Files(self.database, limits)
        self.limits = limits

    async def receive(self, messages: Sequence[Message], content_type: str = FORM, **headers: str) -> File:
        """Receives a request. The client is silent after the messages."""
        waiting = iter(messages)

        async def receive() -> Message:
            message = next(waiting, None)
            return message or await asyncio.get_running_loop().create_future()

        named = {"content-type": content_type, **headers}
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/files",
            "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in named.items()],
        }
        context_of(scope).owner = OWNER
        settings = Settings(max_file_bytes=self.limits.file_bytes, read_timeout=self.read_timeout)
        return await receive_file(Request(scope, receive), self.database, self.files, settings)

    read_timeout = 60.0

    def upload(self, body: bytes, size: int = 2**16, **headers: str) -> File:
        return asyncio.run(self.receive(messages_of(body, size), **headers))

    def content(self, file: File) -> bytes:
        return b"".join(self.files.content(OWNER, file.id))

    @property
    def num_rows(self) -> int:
        """The number of files and chunks in the database, also of uploads that are not finished."""
        with self.database.read() as connection:
            counts = [sa.select(sa.func.count()).select_from(table) for table in (tables.files, tables.chunks)]
            return sum(connection.scalar(count) or 0 for count in counts)


def messages_of(body: bytes, size: int = 2**16) -> list[Message]:
    chunks = [body[i : i + size] for i in range(0, len(body), size)] or [b""]
    return [{"type": "http.request", "body": chunk, "more_body": i < len(chunks) - 1} for i, chunk in enumerate(chunks)]


@contextmanager
def store_in(folder: Path, **limits: int) -> Iterator[Store]:
    store = Store(folder, Limits(**{**{name: getattr(LIMITS, name) for name in Limits.__slots__}, **limits}))
    try:
        yield store
    finally:
        store.database.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with store_in(tmp_path) as store:
        yield store


def test_file_is_stored_with_its_name_and_the_default_lifetime(store: Store) -> None:
    file = store.upload(body_of(PURPOSE, FILE))
    assert (file.filename, file.purpose, file.bytes, file.owner) == ("lines.jsonl", "batch", len(LINES), OWNER)
    assert file.expires_at == file.created_at + 30 * DAY
    assert store.files.get(OWNER, file.id) == file
    assert store.content(file) == LINES


@pytest.mark.parametrize(
    "parts",
    [(FILE, PURPOSE, ANCHOR, SECONDS), (SECONDS, FILE, ANCHOR, PURPOSE), (PURPOSE, ANCHOR, SECONDS, FILE)],
    ids=["file first", "file between", "file last"],
)
def test_fields_may_have_any_order(store: Store, parts: tuple[Part, ...]) -> None:
    file = store.upload(body_of(*parts))
    assert file.expires_at == file.created_at + 7200
    assert store.content(file) == LINES


def test_body_of_another_library_is_stored(store: Store) -> None:
    """httpx builds the body: it quotes the name and adds a Content-Type."""
    request = httpx.Request("POST", "http://test", data={"purpose": "batch"}, files={"file": ('a "b" é.jsonl', LINES)})
    file = store.upload(request.read(), content_type=request.headers["content-type"])
    assert file.filename == 'a "b" é.jsonl'
    assert store.content(file) == LINES


def test_empty_optional_fields_are_ignored(store: Store) -> None:
    file = store.upload(body_of(PURPOSE, (ANCHOR[0], None, b""), (SECONDS[0], None, b""), FILE))
    assert file.expires_at == file.created_at + 30 * DAY


@given(data=st.data())
def test_chunks_of_any_size_give_the_same_file(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    pieces = st.sampled_from([b"\r\n", b"\r", b"--", f"\r\n--{BOUNDARY}"[:-1].encode(), b"\n", b"x", b"\x00\xff"])
    content = b"".join(data.draw(st.lists(pieces, min_size=1, max_size=12)))
    form = file_upload._Form()
    body, size = body_of((*FILE[:2], content), PURPOSE), data.draw(st.integers(1, 40))
    with file_upload._parser(BOUNDARY) as parser:
        for message in messages_of(body, size):
            for event in parser.parse(message["body"]):
                form.add(event)
    form.check()
    assert (form.filename, form.take_piece()) == ("lines.jsonl", content)


def test_large_file_is_stored_in_pieces_with_memory_for_few_of_them(tmp_path: Path) -> None:
    size = 24 * PIECE_BYTES
    content = bytes(range(256)) * (size // 256)
    messages = messages_of(body_of(PURPOSE, ("file", "large", content)))
    with store_in(tmp_path, file_bytes=size, stored_bytes=size) as store:
        tracemalloc.start()
        try:
            file = asyncio.run(store.receive(messages))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        blocks = list(store.files.content(OWNER, file.id))
    assert b"".join(blocks) == content
    assert [len(block) for block in blocks] == [PIECE_BYTES] * 24
    assert peak < size / 3


def error_param(error: errors.InvalidFields) -> tuple[Any, ...]:
    return tuple(error.errors[0]["loc"][1:])


REFUSED: dict[str, tuple[tuple[Part, ...], tuple[str, ...]]] = {
    "no purpose": ((FILE,), ("purpose",)),
    "empty purpose": ((FILE, ("purpose", None, b"")), ("purpose",)),
    "another purpose": ((("purpose", None, b"fine-tune"), FILE), ("purpose",)),
    "purpose that is not UTF-8": ((("purpose", None, b"\xff"), FILE), ("purpose",)),
    "long purpose": ((("purpose", None, b"a" * (MAX_TEXT_BYTES + 1)), FILE), ("purpose",)),
    "purpose twice": ((PURPOSE, PURPOSE, FILE), ("purpose",)),
    "no file": ((PURPOSE,), ("file",)),
    "file twice": ((PURPOSE, FILE, FILE), ("file",)),
    "empty file": ((PURPOSE, ("file", "a", b"")), ("file",)),
    "file without a filename": ((PURPOSE, ("file", None, LINES)), ("file",)),
    "file with an empty filename": ((PURPOSE, ("file", "", LINES)), ("file",)),
    "long filename": ((PURPOSE, ("file", "a" * (MAX_FILENAME + 1), LINES)), ("file",)),
    "filename with a line break": ((PURPOSE, ("file", "a%0Ab", LINES)), ("file",)),
    "filename with a control character": ((PURPOSE, ("file", "a\x00b", LINES)), ("file",)),
    "unknown field": ((PURPOSE, ("purpos", None, b"batch"), FILE), ("purpos",)),
    "field without a name": ((PURPOSE, ("", None, b"batch"), FILE), ("",)),
    "no seconds": ((PURPOSE, ANCHOR, FILE), ("expires_after[seconds]",)),
    "no anchor": ((PURPOSE, SECONDS, FILE), ("expires_after[anchor]",)),
    "another anchor": ((PURPOSE, (ANCHOR[0], None, b"last_active_at"), SECONDS, FILE), ("expires_after[anchor]",)),
    **{
        f"seconds {text!r}": ((PURPOSE, ANCHOR, (SECONDS[0], None, text.encode()), FILE), ("expires_after[seconds]",))
        for text in (str(MIN_LIFETIME - 1), str(MAX_LIFETIME + 1), "7200.0", "-7200", " 7200", "٧٢٠٠", "9" * 500)
    },
}


@pytest.mark.parametrize(("parts", "param"), REFUSED.values(), ids=list(REFUSED))
def test_wrong_field_is_named_and_nothing_is_left(store: Store, parts: tuple[Part, ...], param: tuple[str]) -> None:
    with pytest.raises(errors.InvalidRequest) as raised:
        store.upload(body_of(*parts))
    assert error_param(raised.value) == param
    assert store.num_rows == 0


@pytest.mark.parametrize("seconds", [MIN_LIFETIME, MAX_LIFETIME])
def test_shortest_and_longest_lifetime_are_permitted(store: Store, seconds: int) -> None:
    file = store.upload(body_of(PURPOSE, ANCHOR, (SECONDS[0], None, str(seconds).encode()), FILE))
    assert file.expires_at == file.created_at + seconds


def test_lifetime_after_a_large_file_counts(store: Store) -> None:
    large = ("file", "large", b"a" * (2 * PIECE_BYTES))
    file = store.upload(body_of(large, PURPOSE, ANCHOR, SECONDS))
    assert file.expires_at == file.created_at + int(SECONDS[2])


def test_client_that_sends_a_few_bytes_at_a_time_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of the test says that each chunk takes a second."""
    ticks = itertools.count()
    monkeypatch.setattr(file_upload, "monotonic", lambda: next(ticks))
    store.read_timeout = 5.0
    body = body_of(PURPOSE, ("file", "large", b"a" * 1000))
    with pytest.raises(errors.RequestTimeout, match="more slowly than 32 KiB/s"):
        store.upload(body, size=100)
    assert store.num_rows == 0


def test_unknown_field_is_refused_before_the_rest_arrives(store: Store) -> None:
    body = body_of(PURPOSE, ("unknown", None, b"1"), ("file", "large", b"a" * PIECE_BYTES))
    with pytest.raises(errors.InvalidRequest):  # The other messages would never arrive.
        asyncio.run(store.receive(messages_of(body)[:1]))


BROKEN = {
    "empty body": b"",
    "no boundary": LINES,
    "incomplete": body_of(PURPOSE, FILE)[:-8],
    "another boundary": body_of(PURPOSE, FILE).replace(BOUNDARY.encode(), b"another"),
    "part without headers": f"--{BOUNDARY}\r\n\r\n1\r\n--{BOUNDARY}--\r\n".encode(),
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=list(BROKEN))
def test_body_that_is_not_multipart_is_malformed(store: Store, body: bytes) -> None:
    with pytest.raises(errors.MalformedRequest):
        store.upload(body)
    assert store.num_rows == 0


def test_long_headers_of_a_part_are_refused(store: Store) -> None:
    with pytest.raises(errors.InvalidRequest, match="The headers of a part are too long"):
        store.upload(body_of(PURPOSE, ("file", "a" * 5000, LINES)))


@pytest.mark.parametrize("content_type", ["application/json", "multipart/mixed; boundary=a", ""])
def test_other_media_type_is_refused(store: Store, content_type: str) -> None:
    with pytest.raises(errors.UnsupportedMediaType):
        store.upload(b"", content_type=content_type)


@pytest.mark.parametrize("parameters", ["", "; boundary=", f"; boundary={'a' * 71}"])
def test_media_type_without_a_valid_boundary_is_refused(store: Store, parameters: str) -> None:
    with pytest.raises(errors.MalformedRequest, match="boundary"):
        store.upload(b"", content_type=f"multipart/form-data{parameters}")


@pytest.mark.parametrize("length", [LIMITS.file_bytes + FORM_BYTES + 1, 10**500])
def test_announced_length_beyond_the_limit_is_refused_before_the_body_is_read(store: Store, length: int) -> None:
    with pytest.raises(errors.BodyTooLarge):
        asyncio.run(store.receive([], content_length=str(length)))


def test_largest_file_is_stored_and_a_larger_one_leaves_nothing(store: Store) -> None:
    largest = ("file", "large", b"a" * LIMITS.file_bytes)
    assert store.upload(body_of(PURPOSE, largest)).bytes == LIMITS.file_bytes
    before = store.num_rows
    with pytest.raises(errors.BodyTooLarge, match=str(LIMITS.file_bytes)):
        store.upload(body_of(PURPOSE, ("file", "large", largest[2] + b"a")))
    assert store.num_rows == before


@pytest.mark.parametrize("after_the_end", [False, True])
def test_body_without_a_length_is_read_only_up_to_the_limit(store: Store, after_the_end: bool) -> None:
    """The messages are endless: a body that was read completely would never be answered."""
    chunk = {"type": "http.request", "body": b"a" * 2**16, "more_body": True}
    whole = body_of(PURPOSE, FILE)
    start = whole if after_the_end else whole[: whole.index(LINES)]

    class Endless(list[Message]):
        def __iter__(self) -> Iterator[Message]:
            yield {"type": "http.request", "body": start, "more_body": True}
            while True:
                yield chunk

    with pytest.raises(errors.BodyTooLarge):
        asyncio.run(store.receive(Endless()))
    assert store.num_rows == 0


def test_limits_of_the_owner_are_checked(tmp_path: Path) -> None:
    with store_in(tmp_path, files=1, stored_bytes=2 * PIECE_BYTES) as store:
        with pytest.raises(errors.QuotaExceeded):
            store.upload(body_of(PURPOSE, ("file", "a", b"a" * (2 * PIECE_BYTES + 1))))
        assert store.num_rows == 0
        store.upload(body_of(PURPOSE, FILE))
        with pytest.raises(errors.QuotaExceeded):
            store.upload(body_of(PURPOSE, FILE))


def test_client_that_is_silent_is_answered_and_nothing_is_left(store: Store) -> None:
    store.read_timeout = 0.01
    body = body_of(PURPOSE, ("file", "large", b"a" * (2 * PIECE_BYTES)))
    with pytest.raises(errors.RequestTimeout, match=r"No byte of the body arrived for 0\.01 s"):
        asyncio.run(store.receive(messages_of(body)[:-1]))
    assert store.num_rows == 0


def test_waits_for_the_database_do_not_count_as_silence(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first piece is stored when a timer has ended that began later than that of the wait for the client."""
    store.read_timeout = 0.01
    begin, is_late = store.files.begin, threading.Event()
    content = b"a" * (2 * PIECE_BYTES)

    async def main() -> File:
        loop = asyncio.get_running_loop()

        def slow_begin(*arguments: Any) -> Any:
            loop.call_soon_threadsafe(loop.call_later, 2 * store.read_timeout, is_late.set)
            is_late.wait(60)
            return begin(*arguments)

        monkeypatch.setattr(store.files, "begin", slow_begin)
        return await store.receive(messages_of(body_of(PURPOSE, ("file", "large", content))))

    assert store.content(asyncio.run(main())) == content


@pytest.mark.parametrize("num_bytes", [PIECE_BYTES // 2, 3 * PIECE_BYTES])
def test_upload_of_a_client_that_disconnects_leaves_nothing(store: Store, num_bytes: int) -> None:
    body = body_of(PURPOSE, ("file", "large", b"a" * num_bytes))
    with pytest.raises(ClientDisconnect):
        asyncio.run(store.receive([*messages_of(body)[:-1], {"type": "http.disconnect"}]))
    assert store.num_rows == 0


def test_cancelled_upload_leaves_nothing_although_a_thread_is_storing_a_piece(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    storing, may_store = threading.Event(), threading.Event()
    begin = store.files.begin

    def waiting_begin(*arguments: Any) -> Any:
        storing.set()
        may_store.wait(60)
        return begin(*arguments)

    monkeypatch.setattr(store.files, "begin", waiting_begin)

    async def main() -> None:
        body = body_of(PURPOSE, ("file", "large", b"a" * (2 * PIECE_BYTES)))
        upload = asyncio.create_task(store.receive(messages_of(body)))
        await asyncio.to_thread(storing.wait, 60)
        upload.cancel()
        may_store.set()
        with pytest.raises(asyncio.CancelledError):
            await upload

    asyncio.run(main())
    assert store.num_rows == 0


@pytest.mark.parametrize("failing", ["begin", "add", "finish"])
def test_error_of_the_database_is_raised_and_nothing_is_left(
    store: Store, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    begin: Callable[..., Any] = store.files.begin

    def fail(*arguments: Any) -> Any:
        raise errors.StorageFull

    def failing_begin(*arguments: Any) -> Any:
        upload = begin(*arguments)
        monkeypatch.setattr(upload, failing, fail)
        return upload

    monkeypatch.setattr(store.files, "begin", fail if failing == "begin" else failing_begin)
    with pytest.raises(errors.StorageFull):
        store.upload(body_of(PURPOSE, FILE))
    assert store.num_rows == 0


def test_error_is_kept_if_the_database_cannot_delete_the_upload(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = store.files.begin

    def fail(*arguments: Any) -> Any:
        raise errors.StorageUnavailable(5)

    def failing_begin(*arguments: Any) -> Any:
        upload = begin(*arguments)
        monkeypatch.setattr(upload, "abandon", fail)
        return upload

    monkeypatch.setattr(store.files, "begin", failing_begin)
    with pytest.raises(errors.BodyTooLarge):
        store.upload(body_of(PURPOSE, ("file", "large", b"a" * (LIMITS.file_bytes + 1))))
