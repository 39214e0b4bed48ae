"""Several workers on one PostgreSQL database."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa

from app.batches import batches as batches_module
from app.batches.batches import LEASE_SECONDS
from app.batches.files import Limits
from app.batches.lines import InputLine
from app.batches.records import Batch, Line, NewBatch
from app.batches.tables import batches, lines
from app.batches.tables import workers as seen_workers
from app.errors import NotFound, QuotaExceeded
from tests.app.batches.store import HOOK, LIMITS, OWNER, Store, content_of

AddWorker = Callable[[], Store]
TIMEOUT = 60  # seconds for another thread before the test fails


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def pause(store: Store, seconds: float) -> None:
    """Changes the time at which the worker was seen, as if it had been paused for so long."""
    with store.database.write() as connection:
        own = seen_workers.update().where(seen_workers.c.id == store.database.worker)
        connection.execute(own.values(seen_at=seen_workers.c.seen_at - seconds))


def together(pool: ThreadPoolExecutor, works: Sequence[Callable[[], Any]]) -> list[Any]:
    """Calls the functions at the same time, and returns their results."""
    barrier = threading.Barrier(len(works))

    def call(work: Callable[[], Any]) -> Any:
        barrier.wait(TIMEOUT)
        return work()

    return [future.result(TIMEOUT) for future in [pool.submit(call, work) for work in works]]


def test_tables_are_created_by_workers_that_start_at_the_same_time(
    workers: AddWorker, pool: ThreadPoolExecutor
) -> None:
    stores = [workers() for _ in range(4)]
    together(pool, [store.database.open for store in stores])
    assert all(store.num_lines() == 0 for store in stores)


def test_line_is_never_taken_twice_and_counts_are_exact(workers: AddWorker, pool: ThreadPoolExecutor) -> None:
    stores = [workers() for _ in range(4)]
    batch = stores[0].start(200, webhook_url=HOOK)
    taken = list[Line]()

    def work(store: Store, status: int) -> None:
        while found := store.take(batch, 7):
            taken.extend(found)
            store.answer(found[::2], status=status)
            store.answer(found[1::2])
            store.batches.end_if_done(batch.id)

    together(
        pool,
        [partial(work, store, 200 + number * 100) for number, store in enumerate(stores)],
    )
    assert sorted(line.number for line in taken) == list(range(1, 201))
    ended = stores[0].get(batch)
    assert (ended.status, ended.completed + ended.failed) == ("completed", 200)
    output, errors = (stores[0].results(each) for each in (ended.output_file_id, ended.error_file_id))
    assert (len(output), len(errors)) == (ended.completed, ended.failed)
    for found in (output, errors):
        numbers = [int(each["custom_id"][1:]) for each in found]
        assert numbers == sorted(numbers)
    assert {each["custom_id"] for each in output + errors} == {f"c{number}" for number in range(1, 201)}
    assert stores[0].events() == [(batch.id, "batch.completed")]


@pytest.mark.parametrize("state", ["answered", "cancelled", "expired"])
def test_batch_ends_once_if_workers_end_it_at_the_same_time(
    workers: AddWorker, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    monkeypatch.setattr(batches_module, "LINES_TOGETHER", 3)
    stores = [workers() for _ in range(4)]
    ended = list[Batch]()
    for _ in range(5):
        batch = stores[0].start(8, webhook_url=HOOK)
        if state == "answered":
            stores[0].answer(stores[0].take(batch))
        elif state == "cancelled":
            stores[0].batches.cancel(OWNER, batch.id)
        else:
            stores[0].set_batch(batch, expires_at=0.0)
        results = together(pool, [partial(store.batches.end_if_done, batch.id) for store in stores])
        assert results == [True] * 4
        ended.append(stores[0].get(batch))
    files, _ = stores[0].files.list(OWNER, purpose="batch_output", limit=100)
    assert {file.id for file in files} == {each.output_file_id or each.error_file_id for each in ended}
    assert len(files) == len(stores[0].events()) == 5
    assert {each.completed + each.failed for each in ended} == {8}


def test_cancelling_while_lines_are_taken_and_stored_keeps_counts_exact(
    workers: AddWorker, pool: ThreadPoolExecutor
) -> None:
    first, second = workers(), workers()
    for _ in range(5):
        batch = first.start(60)

        def work(store: Store, batch: Batch = batch) -> None:
            while found := store.take(batch, 3):
                store.answer(found[1:])
            store.batches.release(batch.id)
            store.batches.end_if_done(batch.id)

        def cancel(batch: Batch = batch) -> None:
            first.batches.cancel(OWNER, batch.id)

        together(pool, [lambda: work(first), lambda: work(second), cancel])
        first.batches.release(batch.id)
        assert first.batches.end_if_done(batch.id)
        ended = first.get(batch)
        assert (ended.status, ended.completed + ended.failed) == ("cancelled", 60)
        output = first.results(ended.output_file_id) if ended.output_file_id else []
        assert (len(output), len(first.results(ended.error_file_id))) == (ended.completed, ended.failed)


def test_batch_is_not_cancelled_while_its_lines_are_being_taken(workers: AddWorker, pool: ThreadPoolExecutor) -> None:
    """Otherwise the batch could end between the two statements that find and claim lines."""
    first, second = workers(), workers()
    batch = first.start(3)
    cancelled = list[Future[Batch]]()

    @sa.event.listens_for(first.database.open(), "before_cursor_execute")
    def cancel(_: Any, __: Any, statement: str, *rest: Any) -> None:
        if statement.startswith("UPDATE unfog_lines") and not cancelled:
            cancelled.append(pool.submit(second.batches.cancel, OWNER, batch.id))
            while not cancelled[0].done() and not num_waiting(second):
                pass
            assert not cancelled[0].done()

    assert len(first.take(batch)) == 3
    assert cancelled[0].result(TIMEOUT).status == "cancelling"
    assert not second.batches.end_if_done(batch.id)


def num_waiting(store: Store) -> int:
    """Returns how many transactions of the server wait for a lock."""
    with store.database.read() as connection:
        return int(connection.scalar(sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted")) or 0)


def test_claims_of_a_dead_worker_are_taken_after_its_lease_and_not_before(workers: AddWorker) -> None:
    dead, alive = workers(), workers()
    batch = dead.start(3)
    for store in (dead, alive):
        store.batches.beat(is_alone=False)
    taken = dead.take(batch)
    pause(dead, LEASE_SECONDS - 10)
    alive.batches.beat(is_alone=False)
    assert alive.take(batch) == []
    pause(dead, 11)
    alive.batches.beat(is_alone=False)
    taken_again = alive.take(batch)
    assert taken_again == taken
    stored = dead.answer(taken)  # It was only paused.
    assert (stored.completed, dead.get(batch).completed) == (0, 0)
    assert alive.answer(taken_again).completed == 3


def test_claims_that_a_paused_worker_makes_before_it_is_seen_again_are_taken_back(workers: AddWorker) -> None:
    dead, alive = workers(), workers()
    batch = dead.start(3)
    dead.batches.beat(is_alone=False)
    pause(dead, LEASE_SECONDS + 1)
    alive.batches.beat(is_alone=False)
    assert len(dead.take(batch)) == 3  # and then it is killed
    alive.batches.beat(is_alone=False)
    assert len(alive.take(batch)) == 3


def test_worker_that_is_seen_keeps_its_claims(workers: AddWorker) -> None:
    first, second = workers(), workers()
    batch = first.start(2)
    first.batches.beat(is_alone=False)
    taken = first.take(batch)
    for _ in range(3):
        pause(first, LEASE_SECONDS - 10)
        second.batches.beat(is_alone=False)
        first.batches.beat(is_alone=False)
    assert first.answer(taken).completed == 2


def test_only_one_worker_validates_a_batch(workers: AddWorker, pool: ThreadPoolExecutor) -> None:
    stores = [workers() for _ in range(4)]
    batch = stores[0].create(50)
    results = together(pool, [partial(store.batches.validate, batch.id) for store in stores])
    assert Counter(results) == {True: 1, False: 3}
    assert (stores[0].get(batch).total, stores[0].num_lines()) == (50, 50)


def test_worker_that_lost_a_validation_leaves_the_lines_of_the_next_one(
    workers: AddWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first worker is paused within the validation, and the second one validates and begins to answer."""
    first, second = workers(), workers()
    monkeypatch.setattr(batches_module, "LINES_TOGETHER", 4)
    for store in (first, second):
        store.batches.beat(is_alone=False)
    batch = first.create(10)
    add_lines, blocks = first.batches._add_lines, list[int]()

    def add_after_a_pause(batch_id: str, block: Sequence[InputLine]) -> bool:
        blocks.append(len(block))
        if len(blocks) == 2:
            pause(first, LEASE_SECONDS + 1)
            second.batches.beat(is_alone=False)
            second.batches.validate(batch_id)
            second.answer(second.take(batch, 5))
        return add_lines(batch_id, block)

    monkeypatch.setattr(first.batches, "_add_lines", add_after_a_pause)
    first.batches.validate(batch.id)
    now = second.get(batch)
    assert (now.status, now.total, now.completed) == ("in_progress", 10, 5)
    assert second.finish(batch).completed == 10


def test_file_is_deleted_once_if_two_workers_delete_it(workers: AddWorker, pool: ThreadPoolExecutor) -> None:
    stores = [workers() for _ in range(4)]
    for _ in range(5):
        batch = stores[0].finish(stores[0].start(3))
        file_id = batch.output_file_id or ""

        def delete(store: Store, file_id: str = file_id) -> bool:
            try:
                store.files.delete(OWNER, file_id)
            except NotFound:
                return False
            return True

        results = together(pool, [partial(delete, store) for store in stores])
        assert Counter(results) == {True: 1, False: 3}
    with stores[0].database.read() as connection:
        assert set(connection.scalars(sa.select(batches.c.result_bytes))) == {0}


def test_batch_is_not_created_while_its_file_is_deleted(workers: AddWorker, pool: ThreadPoolExecutor) -> None:
    """Either the deletion or the batch is refused: no batch validates a file that does not exist."""
    first, second = workers(), workers()
    first.database.open()
    for _ in range(10):
        file = first.upload(content_of(2))

        def create(file_id: str = file.id) -> bool:
            return succeeds(lambda: first.batches.create(OWNER, NewBatch(file_id, "/v1/generate")))

        def delete(file_id: str = file.id) -> bool:
            return succeeds(lambda: second.files.delete(OWNER, file_id))

        assert sorted(together(pool, [create, delete])) == [False, True]


def succeeds(work: Callable[[], Any]) -> bool:
    try:
        work()
    except Exception:
        return False
    return True


@pytest.mark.parametrize("limits", [replace(LIMITS, files=5), replace(LIMITS, stored_bytes=5)], ids=["files", "bytes"])
def test_uploads_at_the_same_time_do_not_exceed_the_quota(
    workers: AddWorker, pool: ThreadPoolExecutor, limits: Limits
) -> None:
    store = Store(workers().database, limits)

    def upload() -> bool:
        with suppress(QuotaExceeded):
            store.upload(b"x")
            return True
        return False

    for _ in range(3):
        assert sum(together(pool, [upload] * 8)) <= 5
    assert len(store.files.list(OWNER, limit=100)[0]) == 5


def test_lines_are_taken_while_another_worker_holds_some(workers: AddWorker) -> None:
    first, second = workers(), workers()
    batch = first.start(10)
    with first.database.write() as connection:
        held = sa.select(lines.c.number).where(lines.c.batch_id == batch.id, lines.c.number <= 4).with_for_update()
        connection.execute(held)
        assert [line.number for line in second.take(batch)] == [5, 6, 7, 8, 9, 10]
