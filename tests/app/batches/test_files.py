from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.batches import batches as batches_module
from app.batches import files as files_module
from app.batches.database import Database
from app.batches.files import CHUNK_BYTES, UPLOAD_SECONDS, clean_files
from app.batches.tables import chunks, files
from app.errors import BodyTooLarge, Conflict, FieldError, NotFound, QuotaExceeded
from tests.app.batches.store import LIMITS, OTHER, OWNER, Store


class Clock:
    """Replaces the module `time` in the modules of files and batches."""

    now = 1_000_000.5

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(files_module, "time", clock)
    monkeypatch.setattr(batches_module, "time", clock)
    return clock


def limited(store: Store, **limits: int) -> Store:
    return Store(store.database, replace(LIMITS, **limits))


def ids(page: tuple[list[Any], bool]) -> list[str]:
    return [each.id for each in page[0]]


def test_uploaded_file_is_found_with_its_content(store: Store, clock: Clock) -> None:
    file = store.upload(b"one\ntwo\n", lifetime=60)
    assert file == store.files.get(OWNER, file.id)
    assert (file.bytes, file.filename, file.purpose) == (8, "requests.jsonl", "batch")
    assert (file.created_at, file.expires_at) == (1_000_000, 1_000_060)
    assert store.read(file.id) == b"one\ntwo\n"


def test_content_of_a_large_file_comes_in_blocks(store: Store) -> None:
    content = bytes(range(256)) * (CHUNK_BYTES * 3 // 256) + b"end"
    file = store.upload(content)
    blocks = list(store.files.content(OWNER, file.id))
    assert b"".join(blocks) == content
    assert [len(block) for block in blocks] == [CHUNK_BYTES] * 3 + [3]


def test_empty_file_has_no_content(store: Store) -> None:
    file = store.upload(b"")
    assert (file.bytes, store.read(file.id)) == (0, b"")


def test_other_owner_finds_nothing(store: Store) -> None:
    file = store.upload(b"content")
    for work in (store.files.get, store.files.delete, lambda *args: list(store.files.content(*args))):
        with pytest.raises(NotFound):
            work(OTHER, file.id)
    assert store.files.list(OTHER, limit=10) == ([], False)
    with pytest.raises(FieldError):
        store.files.list(OTHER, after=file.id, limit=10)
    assert store.read(file.id) == b"content"


@pytest.mark.parametrize("file_id", ["", "file-", "file-" + "0" * 24, "x" * 5000, "%", "'; DROP TABLE unfog_files"])
def test_unknown_id_is_not_found(store: Store, file_id: str) -> None:
    store.upload(b"content")
    for work in (store.files.get, store.files.delete, lambda *args: list(store.files.content(*args))):
        with pytest.raises(NotFound):
            work(OWNER, file_id)


@pytest.mark.parametrize("newest_first", [False, True])
def test_pages_have_every_file_once_also_with_equal_times(store: Store, clock: Clock, newest_first: bool) -> None:
    expected = []
    for number in range(9):
        clock.now += number % 3 == 0  # three files have the same time
        file = store.upload(b"")
        expected.append((clock.now, file.id))
    expected.sort(reverse=newest_first)
    found, after, has_more = list[str](), None, True
    while has_more:
        page, has_more = store.files.list(OWNER, after=after, limit=4, newest_first=newest_first)
        found += [file.id for file in page]
        after = page[-1].id
        assert has_more == (len(found) < len(expected))
    assert found == [file_id for _, file_id in expected]


def test_page_that_ends_with_the_last_file_has_no_more(store: Store) -> None:
    for _ in range(3):
        store.upload(b"")
    assert store.files.list(OWNER, limit=3)[1] is False
    assert store.files.list(OWNER, limit=2)[1] is True


def test_list_has_only_files_with_the_purpose(store: Store) -> None:
    batch = store.finish(store.start(2))
    assert ids(store.files.list(OWNER, purpose="batch", limit=10)) == [batch.input_file_id]
    assert ids(store.files.list(OWNER, purpose="batch_output", limit=10)) == [batch.output_file_id]
    assert store.files.list(OWNER, purpose="vision", limit=10) == ([], False)


def test_list_after_an_unknown_file_is_an_error(store: Store) -> None:
    with pytest.raises(FieldError):
        store.files.list(OWNER, after="file-unknown", limit=10)


def test_deleted_file_leaves_nothing(store: Store) -> None:
    file = store.upload(b"x" * (CHUNK_BYTES + 1))
    store.files.delete(OWNER, file.id)
    with pytest.raises(NotFound):
        store.files.get(OWNER, file.id)
    with pytest.raises(NotFound):
        store.files.delete(OWNER, file.id)
    assert (store.rows(files), store.rows(chunks)) == ([], [])


def test_expired_file_is_not_found_before_and_after_it_is_cleaned(store: Store, clock: Clock) -> None:
    kept, expired = store.upload(b"kept", lifetime=61), store.upload(b"expired", lifetime=60)
    clock.now += 60
    with pytest.raises(NotFound):
        store.files.get(OWNER, expired.id)
    with pytest.raises(NotFound):
        store.files.delete(OWNER, expired.id)
    assert ids(store.files.list(OWNER, limit=10)) == [kept.id]
    clean_files(store.database)
    assert [row.id for row in store.rows(files)] == [row.file_id for row in store.rows(chunks)] == [kept.id]


def test_file_that_is_being_uploaded_is_in_no_list(store: Store) -> None:
    upload = store.files.begin(OWNER, "file")
    upload.add(b"part")
    (row,) = store.rows(files)
    assert store.files.list(OWNER, limit=10) == ([], False)
    with pytest.raises(NotFound):
        store.files.get(OWNER, row.id)
    with pytest.raises(NotFound):
        store.files.delete(OWNER, row.id)
    assert upload.finish().id == row.id


def test_abandoned_upload_leaves_nothing(store: Store) -> None:
    upload = store.files.begin(OWNER, "file")
    upload.add(b"part")
    upload.abandon()
    assert (store.rows(files), store.rows(chunks)) == ([], [])


def test_upload_without_chunks_for_long_is_deleted_and_cannot_go_on(store: Store, clock: Clock) -> None:
    upload = store.files.begin(OWNER, "file")
    upload.add(b"part")
    clock.now += UPLOAD_SECONDS - 1
    upload.add(b"part")  # prolongs the upload
    clock.now += UPLOAD_SECONDS - 1
    clean_files(store.database)
    assert len(store.rows(chunks)) == 2
    clock.now += 1
    clean_files(store.database)
    with pytest.raises(NotFound):
        upload.add(b"part")
    with pytest.raises(NotFound):
        upload.finish()
    assert (store.rows(files), store.rows(chunks)) == ([], [])


def test_uploads_are_limited_in_number(store: Store, clock: Clock) -> None:
    store = limited(store, files=2)
    first = store.upload(b"", lifetime=60)
    store.files.begin(OWNER, "unfinished")
    with pytest.raises(QuotaExceeded):
        store.upload(b"")
    store.upload(b"", owner=OTHER)
    store.files.delete(OWNER, first.id)
    store.upload(b"", lifetime=60)
    clock.now += 60  # Expired files do not count, also if they are not deleted yet.
    store.upload(b"")


def test_results_do_not_count_as_uploads(store: Store) -> None:
    store = limited(store, files=2)
    store.finish(store.start(1))
    store.upload(b"")


def test_file_is_limited_in_size(store: Store) -> None:
    store = limited(store, file_bytes=10)
    assert store.upload(b"x" * 10).bytes == 10
    upload = store.files.begin(OWNER, "file")
    upload.add(b"x" * 9)
    with pytest.raises(BodyTooLarge):
        upload.add(b"xx")
    upload.abandon()
    assert len(store.rows(files)) == 1


def test_stored_bytes_are_limited_to_the_byte(store: Store) -> None:
    store = limited(store, stored_bytes=10)
    store.upload(b"x" * 6)
    upload = store.files.begin(OWNER, "file")
    upload.add(b"xxx")
    with pytest.raises(QuotaExceeded):
        upload.add(b"xx")
    assert len(store.rows(chunks)) == 2  # The chunk that is too large is not stored.
    upload.abandon()
    store.upload(b"x" * 4)
    with pytest.raises(QuotaExceeded):
        store.files.begin(OWNER, "file")
    store.upload(b"x" * 10, owner=OTHER)


def test_results_count_as_stored_bytes(store: Store) -> None:
    batch = store.finish(store.start(3))
    output = store.files.get(OWNER, batch.output_file_id or "")
    stored = store.files.get(OWNER, batch.input_file_id).bytes + output.bytes
    store = limited(store, stored_bytes=stored)
    with pytest.raises(QuotaExceeded):
        store.upload(b"x")
    with pytest.raises(QuotaExceeded):
        store.create(b"")
    store.files.delete(OWNER, output.id)
    store.upload(b"x" * output.bytes)


def test_file_cannot_be_deleted_while_a_batch_validates_it(store: Store, clock: Clock) -> None:
    batch = store.create(3)
    with pytest.raises(Conflict, match=batch.id):
        store.files.delete(OWNER, batch.input_file_id)
    clock.now += LIMITS.lifetime
    clean_files(store.database)
    store.batches.validate(batch.id)
    assert store.get(batch).status == "in_progress"
    clean_files(store.database)
    assert store.rows(files) == []
    assert len(store.take(batch)) == 3


def test_content_ends_early_when_the_file_is_deleted(store: Store) -> None:
    file = store.upload(b"x" * (CHUNK_BYTES * 3))
    blocks = store.files.content(OWNER, file.id)
    next(blocks)
    store.files.delete(OWNER, file.id)
    assert list(blocks) == []


def test_results_end_early_when_the_file_is_deleted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "FIRST_PAGE", 2)
    batch = store.finish(store.start(5))
    assert batch.output_file_id
    blocks = store.files.content(OWNER, batch.output_file_id)
    assert next(blocks).count(b"\n") == 2
    store.files.delete(OWNER, batch.output_file_id)
    assert list(blocks) == []


def test_results_come_in_blocks_of_about_the_size_of_a_chunk(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "CHUNK_BYTES", 2000)
    batch = store.finish(store.start(200))
    assert batch.output_file_id
    blocks = list(store.files.content(OWNER, batch.output_file_id))
    assert len(store.results(batch.output_file_id)) == 200
    assert all(len(block) <= 2000 + block.count(b"\n") for block in blocks[1:])


def test_file_names_are_kept(store: Store) -> None:
    name = "ü/../😀 \"'\n.jsonl"
    file = store.files.begin(OWNER, name).finish()
    assert store.files.get(OWNER, file.id).filename == name


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=50), max_size=6))
def test_content_is_what_was_added(database: Database, parts: list[bytes]) -> None:
    store = Store(database)
    upload = store.files.begin("c" * 32, "file")
    for part in parts:
        upload.add(part)
    file = upload.finish()
    assert store.read(file.id, "c" * 32) == b"".join(parts)
    store.files.delete("c" * 32, file.id)
