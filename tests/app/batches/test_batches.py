import json
import time
from dataclasses import replace
from typing import Any

import pytest

from app.batches import batches as batches_module
from app.batches.batches import MOST_UNFINISHED
from app.batches.database import Database
from app.batches.files import FIRST_PAGE
from app.batches.records import COMPLETION_SECONDS, Batch, BatchStatus, NewBatch
from app.batches.tables import batches, lines
from app.errors import Conflict, FieldError, NotFound, QuotaExceeded
from tests.app.batches.store import (
    BAD_HOOK,
    ENDPOINT,
    HOOK,
    LIMITS,
    OTHER,
    OTHER_ENDPOINT,
    OWNER,
    Store,
    content_of,
    line_of,
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes 10 lines take several transactions."""
    monkeypatch.setattr(batches_module, "LINES_TOGETHER", 4)


@pytest.fixture(params=[7, 8, 9])
def num_lines(request: pytest.FixtureRequest) -> int:
    """Returns numbers of lines that do and do not fill their last block."""
    return int(request.param)


def expire(store: Store, batch: Batch) -> None:
    store.set_batch(batch, expires_at=0.0)


def test_new_batch_is_validating(store: Store) -> None:
    file = store.upload(content_of(3))
    new = NewBatch(file.id, ENDPOINT, {"name": "ü"}, output_lifetime=3600, webhook_url=HOOK)
    batch = store.batches.create(OWNER, new)
    assert batch == store.batches.get(OWNER, batch.id)
    assert (batch.status, batch.metadata, batch.endpoint) == ("validating", {"name": "ü"}, ENDPOINT)
    assert batch.expires_at - batch.created_at == COMPLETION_SECONDS
    assert (batch.total, batch.errors, batch.output_file_id, batch.in_progress_at) == (0, (), None, None)
    assert [each.id for each in store.batches.active()] == [batch.id]


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("endpoint", {"endpoint": "/v1/unknown"}),
        ("endpoint", {"endpoint": ""}),
        ("input_file_id", {"input_file_id": "file-unknown"}),
        ("input_file_id", {"input_file_id": ""}),
        ("webhook_url", {"webhook_url": BAD_HOOK}),
    ],
)
def test_batch_with_an_invalid_field_is_not_created(store: Store, field: str, values: dict[str, Any]) -> None:
    fields = {"input_file_id": store.upload(b"").id, "endpoint": ENDPOINT} | values
    with pytest.raises(FieldError) as caught:
        store.batches.create(OWNER, NewBatch(**fields))
    assert caught.value.field == field
    assert store.rows(batches) == []


def test_batch_needs_a_finished_unexpired_upload_of_its_owner(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = store.files.begin(OWNER, "file")
    short, other = store.upload(b"", lifetime=1), store.upload(b"", owner=OTHER)
    now = time.time()
    monkeypatch.setattr("app.batches.batches.time.time", lambda: now + 2)
    for file_id in (upload._id, short.id, other.id):
        with pytest.raises(FieldError):
            store.batches.create(OWNER, NewBatch(file_id, ENDPOINT))


def test_owner_has_a_limited_number_of_unfinished_batches(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "MOST_UNFINISHED", 2)
    assert MOST_UNFINISHED > 2
    batch = store.create(1)
    store.start(1)
    with pytest.raises(QuotaExceeded):
        store.create(1)
    store.create(1, owner=OTHER)
    store.batches.cancel(OWNER, batch.id)
    store.create(1)


def test_other_owner_finds_no_batch(store: Store) -> None:
    batch = store.start(1)
    for work in (store.batches.get, store.batches.cancel, store.batches.answers):
        for owner, batch_id in ((OTHER, batch.id), (OWNER, "batch_unknown")):
            with pytest.raises(NotFound):
                work(owner, batch_id)
    assert store.batches.list(OTHER, limit=10) == ([], False)
    with pytest.raises(FieldError):
        store.batches.list(OTHER, after=batch.id, limit=10)


def test_pages_have_every_batch_once_newest_first(store: Store) -> None:
    created = [store.create(1) for _ in range(7)]
    for number, batch in enumerate(created):
        store.set_batch(batch, created_at=number // 3)  # three batches have the same time
    expected = sorted(((number // 3, batch.id) for number, batch in enumerate(created)), reverse=True)
    found, after, has_more = list[str](), None, True
    while has_more:
        page, has_more = store.batches.list(OWNER, after=after, limit=3)
        found += [batch.id for batch in page]
        after = page[-1].id
    assert found == [batch_id for _, batch_id in expected]


def test_valid_batch_is_in_progress_with_all_lines(store: Store) -> None:
    batch = store.start(10)
    assert (batch.status, batch.total, batch.completed, batch.failed) == ("in_progress", 10, 0, 0)
    assert batch.in_progress_at is not None
    taken = store.take(batch)
    assert [(line.number, line.custom_id, line.endpoint) for line in taken] == [
        (number, f"c{number}", ENDPOINT) for number in range(1, 11)
    ]
    assert not store.batches.validate(batch.id)  # There is nothing more to validate.


def test_blank_lines_do_not_count_and_keep_the_numbers(store: Store) -> None:
    batch = store.start(b"\n" + line_of("a") + b"\n\n" + line_of("b"))
    assert batch.total == 2
    assert [line.number for line in store.take(batch)] == [2, 5]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        content_of(10) + b"{\n",
        b"{\n" + content_of(10),
        content_of(5) + b"{\n" + line_of("x") * 7,
        content_of(9) + line_of("c9"),
        content_of(9) + line_of("x", url=OTHER_ENDPOINT),
        content_of(13),
    ],
    ids=["empty", "last line", "first line", "middle", "doubled", "url", "too many"],
)
def test_batch_with_an_invalid_line_fails_without_lines_and_files(store: Store, content: bytes) -> None:
    store = Store(store.database, replace(LIMITS, lines=12))
    batch = store.start(content, webhook_url=HOOK)
    assert (batch.status, batch.total, batch.output_file_id, batch.error_file_id) == ("failed", 0, None, None)
    assert batch.errors
    assert batch.failed_at is not None
    assert store.num_lines() == 0
    assert store.take(batch) == []
    assert store.events() == [(batch.id, "batch.failed")]
    assert store.batches.end_if_done(batch.id)  # changes nothing
    assert len(store.events()) == 1


def test_errors_of_a_failed_batch_name_their_lines(store: Store) -> None:
    batch = store.start(line_of("a") + b"[]\n" + line_of("a"))
    assert [(error.code, error.line, error.param) for error in batch.errors] == [
        ("invalid_line", 2, None),
        ("duplicate_custom_id", 3, "custom_id"),
    ]


def test_completed_batch_has_each_line_in_the_file_of_its_result(store: Store) -> None:
    batch = store.start(10, webhook_url=HOOK)
    taken = store.take(batch)
    store.answer(reversed(taken[5:]), images=2)
    store.answer(taken[3:5], status=400)
    assert not store.batches.end_if_done(batch.id)
    assert store.answer(taken[:3], images=3).ready == (batch.id,)
    assert store.batches.end_if_done(batch.id)
    ended = store.get(batch)
    assert (ended.status, ended.total, ended.completed, ended.failed, ended.images) == ("completed", 10, 8, 2, 19)
    assert ended.completed_at and ended.finalizing_at
    output, errors = store.results(ended.output_file_id), store.results(ended.error_file_id)
    assert [each["custom_id"] for each in output] == ["c1", "c2", "c3", "c6", "c7", "c8", "c9", "c10"]
    assert [each["custom_id"] for each in errors] == ["c4", "c5"]
    assert output[0]["response"] == {"status_code": 200, "request_id": "req_1", "body": {"status": 200}}
    assert output[0]["error"] is errors[0]["error"] is None
    assert errors[0]["response"]["status_code"] == 400
    assert len({each["id"] for each in output + errors}) == 10
    assert store.events() == [(batch.id, "batch.completed")]


def test_batch_without_failed_lines_has_no_error_file(store: Store) -> None:
    ended = store.finish(store.start(2))
    assert ended.output_file_id
    assert ended.error_file_id is None


def test_batch_without_completed_lines_has_no_output_file(store: Store) -> None:
    batch = store.start(2)
    store.answer(store.take(batch), status=500)
    store.batches.end_if_done(batch.id)
    ended = store.get(batch)
    assert ended.output_file_id is None
    assert len(store.results(ended.error_file_id)) == 2


def test_output_lifetime_is_that_of_the_files(store: Store) -> None:
    ended = store.finish(store.start(1, output_lifetime=7))
    file = store.files.get(OWNER, ended.output_file_id or "")
    assert file.expires_at is not None
    assert file.expires_at - file.created_at == 7
    assert file.filename == f"{ended.id}_output.jsonl"


def test_answers_are_those_that_succeeded_so_far(store: Store) -> None:
    batch = store.start(6)
    taken = store.take(batch, 4)
    store.answer(taken[2:])
    store.answer(taken[:1], status=400)
    store.answer(taken[1:2])
    found = list(store.batches.answers(OWNER, batch.id))
    assert [(line.number, line.custom_id) for line, _ in found] == [(2, "c2"), (3, "c3"), (4, "c4")]
    assert json.loads(found[0][1]) == {"status": 200}


@pytest.mark.parametrize("has_ended", [False, True])
def test_answers_that_are_deleted_meanwhile_are_never_complete(store: Store, has_ended: bool) -> None:
    batch = store.start(FIRST_PAGE + 1)
    store.answer(store.take(batch))
    if has_ended:
        store.batches.end_if_done(batch.id)
    found = store.batches.answers(OWNER, batch.id)
    next(found)
    store.batches.end_if_done(batch.id)
    store.files.delete(OWNER, store.get(batch).output_file_id or "")
    with pytest.raises(NotFound):
        list(found)


def test_lines_are_taken_once_in_order(store: Store) -> None:
    batch = store.start(10)
    numbers = [[line.number for line in store.take(batch, 4)] for _ in range(4)]
    assert numbers == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10], []]


def test_released_lines_can_be_taken_again(store: Store) -> None:
    first, second = store.start(2), store.start(2)
    store.take(first)
    store.take(second)
    store.batches.release(first.id)
    assert (len(store.take(first)), len(store.take(second))) == (2, 0)
    store.batches.release()
    assert (len(store.take(first)), len(store.take(second))) == (2, 2)


def test_answers_of_lines_that_were_not_claimed_are_dropped(store: Store) -> None:
    batch = store.start(4)
    taken = store.take(batch, 2)
    store.answer(taken[:1])
    store.batches.release()
    stored = store.answer(taken)  # The first one has a result, and the second one was given back.
    assert (stored.completed, stored.failed, stored.images, stored.ready) == (0, 0, 0, ())
    assert (store.get(batch).completed, store.get(batch).images) == (1, 1)


def test_lines_of_several_batches_are_stored_together(store: Store) -> None:
    first, second = store.start(2), store.start(3)
    taken = [*store.take(second), *store.take(first, 1)]
    stored = store.answer(taken, images=2)
    assert (stored.completed, stored.images, stored.ready) == (4, 8, (second.id,))
    assert (store.get(first).completed, store.get(second).completed) == (1, 3)


# Cancelling


def test_cancelled_batch_that_is_validating_ends_at_once(store: Store) -> None:
    batch = store.create(10, webhook_url=HOOK)
    cancelled = store.batches.cancel(OWNER, batch.id)
    assert (cancelled.status, cancelled.output_file_id, cancelled.error_file_id) == ("cancelled", None, None)
    assert cancelled.cancelling_at and cancelled.cancelled_at
    assert store.events() == [(batch.id, "batch.cancelled")]
    assert not store.batches.validate(batch.id)
    assert store.num_lines() == 0


def test_batch_that_is_cancelled_during_the_validation_keeps_no_lines(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = store.create(10)
    add_lines = store.batches._add_lines

    def add_and_cancel(*args: Any) -> bool:
        added = add_lines(*args)
        if store.get(batch).status is BatchStatus.VALIDATING:
            assert store.num_lines() == 4
            store.batches.cancel(OWNER, batch.id)
        return added

    monkeypatch.setattr(store.batches, "_add_lines", add_and_cancel)
    store.batches.validate(batch.id)
    assert store.get(batch).status == "cancelled"
    assert store.num_lines() == 0


def test_cancelled_batch_ends_when_no_line_is_being_answered(store: Store) -> None:
    batch = store.start(10, webhook_url=HOOK)
    taken = store.take(batch, 5)
    store.answer(taken[:2])
    assert store.batches.cancel(OWNER, batch.id).status == "cancelling"
    assert store.take(batch) == []
    assert not store.batches.end_if_done(batch.id)
    store.answer(taken[2:3])  # A line that is finished meanwhile counts.
    store.batches.release(batch.id)
    assert store.batches.end_if_done(batch.id)
    ended = store.get(batch)
    assert (ended.status, ended.completed, ended.failed) == ("cancelled", 3, 7)
    assert [each["custom_id"] for each in store.results(ended.output_file_id)] == ["c1", "c2", "c3"]
    errors = store.results(ended.error_file_id)
    assert [each["custom_id"] for each in errors] == [f"c{number}" for number in range(4, 11)]
    assert {(each["response"], each["error"]["code"]) for each in errors} == {(None, "batch_cancelled")}
    assert set(errors[0]) == {"id", "custom_id", "response", "error"}
    assert store.events() == [(batch.id, "batch.cancelled")]


def test_batch_that_is_cancelled_twice_is_cancelling(store: Store) -> None:
    batch = store.start(3)
    first = store.batches.cancel(OWNER, batch.id)
    assert store.batches.cancel(OWNER, batch.id) == first


def test_batch_that_is_cancelled_after_its_last_line_is_cancelled(store: Store) -> None:
    batch = store.start(3)
    store.answer(store.take(batch))
    store.batches.cancel(OWNER, batch.id)
    assert store.batches.end_if_done(batch.id)
    ended = store.get(batch)
    assert (ended.status, ended.completed, ended.failed) == ("cancelled", 3, 0)
    assert len(store.results(ended.output_file_id)) == 3


@pytest.mark.parametrize("status", ["failed", "completed", "expired", "cancelled"])
def test_batch_that_has_ended_cannot_be_cancelled(store: Store, status: str) -> None:
    batch = store.start(1)
    store.set_batch(batch, status=status)
    with pytest.raises(Conflict, match=status):
        store.batches.cancel(OWNER, batch.id)
    assert store.get(batch).status == status


# Expiry


def test_expired_batch_ends_with_errors_for_the_other_lines(store: Store) -> None:
    batch = store.start(10, webhook_url=HOOK)
    taken = store.take(batch, 3)
    store.answer(taken[:2])
    expire(store, batch)
    assert [(each.id, each.is_expired, each.is_answered) for each in store.batches.active()] == [
        (batch.id, True, False)
    ]
    assert not store.batches.end_if_done(batch.id)
    store.batches.release()
    assert store.batches.end_if_done(batch.id)
    ended = store.get(batch)
    assert (ended.status, ended.completed, ended.failed) == ("expired", 2, 8)
    assert ended.expired_at is not None
    assert len(store.results(ended.output_file_id)) == 2
    errors = store.results(ended.error_file_id)
    assert [each["custom_id"] for each in errors] == [f"c{number}" for number in range(3, 11)]
    assert {each["error"]["code"] for each in errors} == {"batch_expired"}
    assert store.events() == [(batch.id, "batch.expired")]
    assert store.batches.active() == []


@pytest.mark.parametrize("status", ["expired", "cancelled"])
def test_batch_ends_with_one_status_whatever_its_number_of_lines(store: Store, num_lines: int, status: str) -> None:
    batch = store.start(num_lines, webhook_url=HOOK)
    if status == "expired":
        expire(store, batch)
    else:
        store.batches.cancel(OWNER, batch.id)
    assert store.batches.end_if_done(batch.id)
    ended = store.get(batch)
    assert (ended.status, ended.total, ended.failed) == (status, num_lines, num_lines)
    assert len(store.results(ended.error_file_id)) == num_lines
    assert store.events() == [(batch.id, f"batch.{status}")]


def test_batch_that_expires_after_its_last_line_is_completed(store: Store) -> None:
    batch = store.start(2)
    store.answer(store.take(batch))
    expire(store, batch)
    assert store.batches.end_if_done(batch.id)
    assert store.get(batch).status == "completed"


def test_batch_that_expires_while_it_is_cancelled_is_cancelled(store: Store) -> None:
    batch = store.start(2)
    store.batches.cancel(OWNER, batch.id)
    expire(store, batch)
    assert store.batches.end_if_done(batch.id)
    assert store.get(batch).status == "cancelled"


def test_batch_that_expires_before_it_is_validated_expires_afterwards(store: Store) -> None:
    batch = store.create(3)
    expire(store, batch)
    store.batches.validate(batch.id)
    assert store.batches.end_if_done(batch.id)
    ended = store.get(batch)
    assert (ended.status, ended.failed, ended.output_file_id) == ("expired", 3, None)


def test_lines_are_taken_together_up_to_a_number_of_bytes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = store.start(content_of(6, prompt="x" * 1000))
    monkeypatch.setattr(batches_module, "BYTES_TOGETHER", 2500)
    assert [line.number for line in store.take(batch)] == [1, 2]
    monkeypatch.setattr(batches_module, "BYTES_TOGETHER", 10)
    assert [line.number for line in store.take(batch)] == [3]
    assert [line.number for line in store.take(batch, 1)] == [4]


# Deletion


def test_copied_lines_count_as_stored_until_the_batch_ends(database: Database) -> None:
    """Otherwise, many batches of one large file would store it many times."""
    content = content_of(100)
    store = Store(database, replace(LIMITS, stored_bytes=len(content) * 5 // 2))
    file = store.upload(content)
    first = store.batches.create(OWNER, NewBatch(file.id, ENDPOINT))
    with pytest.raises(QuotaExceeded):
        store.batches.create(OWNER, NewBatch(file.id, ENDPOINT))
    store.batches.cancel(OWNER, first.id)
    store.batches.create(OWNER, NewBatch(file.id, ENDPOINT))


def test_result_bytes_are_the_sizes_of_the_files(store: Store) -> None:
    batch = store.start(9)
    taken = store.take(batch, 5)
    store.answer(taken[:3])
    store.answer(taken[3:], status=400)
    store.batches.cancel(OWNER, batch.id)
    store.batches.end_if_done(batch.id)
    ended = store.get(batch)
    sizes = [store.files.get(OWNER, each or "").bytes for each in (ended.output_file_id, ended.error_file_id)]
    assert store.rows(batches)[0].result_bytes == sum(sizes)
    store.files.delete(OWNER, ended.output_file_id or "")
    assert store.rows(batches)[0].result_bytes == sizes[1]
    store.files.delete(OWNER, ended.error_file_id or "")
    assert store.rows(batches)[0].result_bytes == 0
    assert {row.result for row in store.rows(lines)} == {None}


def test_batch_names_no_file_that_was_deleted(store: Store) -> None:
    batch = store.start(4)
    taken = store.take(batch)
    store.answer(taken[:2])
    store.answer(taken[2:], status=400)
    store.batches.end_if_done(batch.id)
    ended = store.get(batch)
    store.files.delete(OWNER, ended.error_file_id or "")
    after = store.get(batch)
    assert (after.output_file_id, after.error_file_id) == (ended.output_file_id, None)
    assert len(store.results(after.output_file_id)) == 2
    store.files.delete(OWNER, ended.output_file_id or "")
    assert (store.get(batch).output_file_id, store.get(batch).completed) == (None, 2)
    with pytest.raises(NotFound):
        store.batches.answers(OWNER, batch.id)


def test_clean_deletes_batches_that_are_old_and_have_no_files(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    running, deleted, kept = store.start(2), store.finish(store.start(2)), store.finish(store.start(2))
    failed, young = store.start(b""), store.start(b"")
    now = time.time()
    for batch in (running, deleted, kept, failed):
        store.set_batch(batch, created_at=now - LIMITS.lifetime - 10)
    store.files.delete(OWNER, deleted.output_file_id or "")
    store.batches.clean()
    assert {row.id for row in store.rows(batches)} == {running.id, kept.id, young.id}
    assert {row.batch_id for row in store.rows(lines)} == {running.id, kept.id}
    monkeypatch.setattr("app.batches.batches.time.time", lambda: now + LIMITS.lifetime + 10)
    store.batches.clean()  # The files of the batch have expired, too.
    assert {row.id for row in store.rows(batches)} == {running.id}


# What a worker leaves when it ends


def test_claims_of_the_process_before_are_taken_at_the_start(store: Store) -> None:
    batch, unvalidated = store.start(3), store.create(2)
    store.batches.beat(is_alone=True)
    store.take(batch)
    assert store.batches._claim(unvalidated.id)
    store.database.worker = "next"
    assert not store.batches.validate(unvalidated.id)
    store.batches.beat(is_alone=True)
    assert len(store.take(batch)) == 3
    assert store.batches.validate(unvalidated.id)


def test_validation_that_was_interrupted_begins_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = store.create(10)
    with monkeypatch.context() as patch:
        patch.setattr(store.batches, "_start", lambda *_: None)
        store.batches.validate(batch.id)
    assert store.num_lines() == 10
    store.batches.validate(batch.id)
    assert (store.get(batch).status, store.get(batch).total, store.num_lines()) == ("in_progress", 10, 10)


def test_validation_ends_early_at_a_shutdown(store: Store) -> None:
    batch = store.create(10)
    store.batches.is_stopping.set()
    store.batches.validate(batch.id)
    assert store.get(batch).status == "validating"
    store.batches.release()
    store.batches.is_stopping.clear()
    store.batches.validate(batch.id)
    assert store.get(batch).total == 10


def test_seed_key_of_a_line_is_the_same_after_it_was_given_back(store: Store) -> None:
    batch = store.start(2)
    keys = [line.key for line in store.take(batch)]
    store.batches.release()
    assert [line.key for line in store.take(batch)] == keys == [f"{batch.id}_1", f"{batch.id}_2"]
