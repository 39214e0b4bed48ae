import asyncio
import contextlib
import json
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from app.batches import batches as batches_module
from app.batches import runner as runner_module
from app.batches.batches import LEASE_SECONDS
from app.batches.database import Database
from app.batches.records import Batch, Line, LineAnswer
from app.batches.runner import FEWEST_IMAGES, LINES_TAKEN, BatchRunner
from app.batches.tables import lines as line_table
from app.errors import StorageFull, StorageUnavailable
from app.metrics import Metrics
from tests.app.batches.store import HOOK, OWNER, Store, content_of
from tests.app.batches.test_workers import pause

TIMEOUT = 60  # seconds to wait for an expected event before the test fails
Condition = Callable[[], Any]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(runner_module, "WATCH_SECONDS", 0.05)


class Answers:
    """Answers lines. `started` has the lines in the order of their starts."""

    def __init__(self, *, is_open: bool = True) -> None:
        self.started, self.cancelled = list[Line](), list[Line]()
        self.running: dict[str, Line] = {}  # by key
        self.evaluations = Counter[str]()  # computed for each batch
        self.most_running = 0
        self._changed = asyncio.Condition()
        self._permits = 10**9 if is_open else 0

    async def __call__(self, line: Line) -> LineAnswer:
        self.started.append(line)
        assert line.key not in self.running
        self.running[line.key] = line
        self.most_running = max(self.most_running, len(self.running))
        await self.changed()
        try:
            async with self._changed:
                await self._changed.wait_for(lambda: self._permits > 0)
                self._permits -= 1
        except asyncio.CancelledError:
            self.cancelled.append(line)
            raise
        finally:
            del self.running[line.key]
        await self.changed()
        return self.answer_of(line)

    def answer_of(self, line: Line) -> LineAnswer:
        fields = json.loads(line.body)
        if fields.get("fails"):
            raise ZeroDivisionError
        cost = fields.get("cost", 1)
        self.evaluations[line.batch_id] += cost
        return LineAnswer(fields.get("status", 200), f"req_{line.number}", line.body, fields.get("n", 1), cost)

    async def permit(self, count: int = 10**9) -> None:
        """Lets so many more lines be answered."""
        self._permits += count
        await self.changed()

    async def changed(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def until(self, condition: Condition) -> None:
        """Waits until a condition is true that changes when lines start and end."""
        async with asyncio.timeout(TIMEOUT), self._changed:
            await self._changed.wait_for(condition)


class Worker:
    """A runner in the event loop."""

    def __init__(self, store: Store, answers: Any, full_step: int = 1) -> None:
        self.store, self.metrics, self.can_answer = store, Metrics(), True
        self._ended = asyncio.Event()
        self.runner = BatchRunner(
            store.database,
            store.batches,
            answers,
            lambda: full_step,
            lambda: self.can_answer,
            store.rates,
            self.metrics,
            self._ended.set,
        )
        self.task = asyncio.create_task(self.runner.run())

    async def until(self, batch: Batch, *statuses: str) -> Batch:
        """Waits until the batch has one of these statuses."""
        async with asyncio.timeout(TIMEOUT):
            while True:
                self._ended.clear()
                now = await self.store.database.run(self.store.get, batch)
                if now.status in statuses:
                    return now
                await self._ended.wait()

    async def stop(self) -> None:
        self.store.batches.is_stopping.set()
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.store.batches.is_stopping.clear()


@contextlib.asynccontextmanager
async def running(store: Store, answers: Any, full_step: int = 1) -> AsyncIterator[Worker]:
    worker = Worker(store, answers, full_step)
    try:
        yield worker
    finally:
        await worker.stop()


async def until(condition: Condition) -> None:
    """Polls a condition that no event reports."""
    async with asyncio.timeout(TIMEOUT):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def test_runner_answers_every_line_once_and_ends_the_batches(store: Store) -> None:
    sizes = [1, LINES_TAKEN, LINES_TAKEN * 2 + 5]
    batches = [store.create(size, webhook_url=HOOK) for size in sizes]

    async def main() -> None:
        answers = Answers()
        async with running(store, answers) as worker:
            for batch in batches:
                ended = await worker.until(batch, "completed")
                assert ended.completed == ended.images == ended.total
            value = worker.metrics.registry.get_sample_value
            assert value("unfog_batch_lines_total", {"result": "completed"}) == sum(sizes)
        assert Counter(line.key for line in answers.started) == Counter(
            f"{batch.id}_{number}" for batch, size in zip(batches, sizes, strict=True) for number in range(1, size + 1)
        )

    asyncio.run(main())
    for batch, size in zip(batches, sizes, strict=True):
        output = store.results(store.get(batch).output_file_id)
        assert [each["response"]["request_id"] for each in output] == [f"req_{i}" for i in range(1, size + 1)]
    assert sorted(store.events()) == sorted((batch.id, "batch.completed") for batch in batches)


def test_runner_notices_a_batch_when_it_is_woken(tmp_path: Path) -> None:
    with closing(Database(tmp_path)) as database:
        store = Store(database)

        async def main() -> None:
            async with running(store, Answers()) as worker:
                await asyncio.sleep(0)
                assert not database.exists  # A service without batches creates no database.
                batch = await database.run(store.create, 2)
                worker.runner.wake()
                await worker.until(batch, "completed")

        asyncio.run(main())


def test_failed_batch_is_reported(store: Store) -> None:
    batch = store.create(b"{")

    async def main() -> None:
        async with running(store, Answers()) as worker:
            assert (await worker.until(batch, "failed")).errors

    asyncio.run(main())


def test_bug_fails_only_its_line(store: Store) -> None:
    batch = store.create(content_of(2) + content_of(1, fails=True).replace(b"c1", b"bug"))

    async def main() -> None:
        async with running(store, Answers()) as worker:
            ended = await worker.until(batch, "completed")
            assert (ended.completed, ended.failed) == (2, 1)

    asyncio.run(main())
    (error,) = store.results(store.get(batch).error_file_id)
    assert (error["custom_id"], error["response"]["status_code"]) == ("bug", 500)
    assert error["response"]["body"]["error"]["code"] == "internal_error"


def test_batch_that_cannot_be_validated_does_not_delay_the_others(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison, batch = store.create(1), store.create(1)
    validate = store.batches.validate

    def fail(batch_id: str) -> bool:
        if batch_id == poison.id:
            raise ZeroDivisionError
        return validate(batch_id)

    monkeypatch.setattr(store.batches, "validate", fail)

    async def main() -> None:
        async with running(store, Answers()) as worker:
            await worker.until(batch, "completed")

    asyncio.run(main())


def test_lines_are_answered_and_cancelled_while_a_file_is_validated(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, large = store.start(3), store.start(3), store.create(1)
    may_validate = threading.Event()
    validate = store.batches.validate

    def wait(batch_id: str) -> bool:
        assert may_validate.wait(TIMEOUT)
        return validate(batch_id)

    monkeypatch.setattr(store.batches, "validate", wait)

    async def main() -> None:
        answers = Answers(is_open=False)
        async with running(store, answers) as worker:
            try:
                await answers.until(lambda: len(answers.running) == 6)
                await store.database.run(store.batches.cancel, OWNER, first.id)
                worker.runner.wake()
                await worker.until(first, "cancelled")
                await answers.permit()
                await worker.until(second, "completed")
            finally:
                may_validate.set()
            await worker.until(large, "completed")

    asyncio.run(main())


def test_images_in_progress_are_limited(store: Store) -> None:
    batch = store.create(content_of(100, n=10))

    async def main() -> None:
        answers = Answers(is_open=False)
        async with running(store, answers, full_step=100) as worker:
            await answers.until(lambda: len(answers.running) == 20)  # 2 steps of 100 rows
            await answers.permit()
            await worker.until(batch, "completed")
            assert answers.most_running == 20

    asyncio.run(main())


def test_small_step_has_the_fewest_images_in_progress(store: Store) -> None:
    batch = store.create(FEWEST_IMAGES * 2)

    async def main() -> None:
        answers = Answers(is_open=False)
        async with running(store, answers) as worker:
            await answers.until(lambda: len(answers.running) == FEWEST_IMAGES)
            await answers.permit()
            await worker.until(batch, "completed")
            assert answers.most_running == FEWEST_IMAGES

    asyncio.run(main())


class RoundRobin(Answers):
    """An engine whose steps compute an evaluation of every line in progress. It waits for the runner between steps."""

    def __init__(self, share: int) -> None:
        super().__init__()
        self._share = share  # of each batch in the lines in progress
        self._left = dict[str, int]()  # evaluations by the key of the line

    async def __call__(self, line: Line) -> LineAnswer:
        cost = json.loads(line.body)["cost"]
        self.started.append(line)
        self.running[line.key], self._left[line.key] = line, cost
        await self.changed()
        await self.until(lambda: self._left[line.key] == 0)
        del self.running[line.key]
        await self.changed()
        return LineAnswer(200, "", b"{}", 1, cost)

    async def run(self, totals: Counter[str]) -> Counter[str]:
        """Runs until a batch has no lines for its share. Returns the evaluations that were computed for each."""
        computed = Counter[str]()
        while all(
            (totals - self._of_batch(self.started) + self._of_batch()).get(each, 0) > self._share for each in totals
        ):
            await self.until(lambda: all(self._of_batch()[each] >= self._share for each in totals))
            for line in self.running.values():
                self._left[line.key] -= 1
                computed[line.batch_id] += 1
            await self.changed()
            await self.until(lambda: all(self._left[key] for key in self.running))
        return computed

    def _of_batch(self, lines: Iterable[Line] | None = None) -> Counter[str]:
        """Returns the numbers of lines, or of lines in progress, of the batches."""
        return Counter(line.batch_id for line in (self.running.values() if lines is None else lines))


def test_batches_with_long_and_short_lines_get_the_same_evaluations(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "FEWEST_IMAGES", 4)
    long, short = store.start(content_of(8, cost=100)), store.start(content_of(200, cost=4))

    async def main() -> None:
        engine = RoundRobin(share=2)
        async with running(store, engine):
            computed = await engine.run(Counter({long.id: 8, short.id: 200}))
        assert min(computed.values()) > 500
        assert 0.8 < computed[long.id] / computed[short.id] < 1.25

    asyncio.run(main())


def test_next_line_is_that_of_the_batch_with_fewest_evaluations(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are answered one after the other, so that only their order decides."""
    monkeypatch.setattr(runner_module, "FEWEST_IMAGES", 1)
    long, short = store.create(content_of(20, cost=100)), store.create(content_of(600, cost=4))

    async def main() -> None:
        answers = Answers(is_open=False)
        async with running(store, answers, full_step=0) as worker:
            for batch in (long, short):
                await worker.until(batch, "in_progress")
            await until(lambda: {long.id, short.id} <= worker.runner._work.keys())
            await answers.permit(250)
            await answers.until(lambda: sum(answers.evaluations.values()) > 0 and answers._permits == 0)
        assert 0.8 < answers.evaluations[long.id] / answers.evaluations[short.id] < 1.25

    asyncio.run(main())


def test_new_batch_is_served_at_once_and_does_not_catch_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "FEWEST_IMAGES", 4)
    store.create(content_of(300))

    async def main() -> None:
        answers = Answers(is_open=False)
        async with running(store, answers) as worker:
            await answers.permit(100)
            await answers.until(lambda: len(answers.started) == 104)
            new = await store.database.run(store.create, 100)
            worker.runner.wake()
            await worker.until(new, "in_progress")
            await until(lambda: new.id in worker.runner._work)
            await answers.permit(1)
            await answers.until(lambda: len(answers.started) == 105)
            assert answers.started[-1].batch_id == new.id
            await answers.permit(60)
            await answers.until(lambda: len(answers.started) == 165)
            counts = Counter(line.batch_id for line in answers.started[104:])
            assert 20 <= counts[new.id] <= 40

    asyncio.run(main())


def test_cancelled_batch_stops_its_lines_and_ends(store: Store) -> None:
    batch = store.create(10)

    async def main() -> None:
        answers = Answers(is_open=False)
        async with running(store, answers) as worker:
            await answers.until(lambda: len(answers.running) == 10)
            await answers.permit(3)
            await answers.until(lambda: len(answers.running) == 7)
            await until(lambda: store.get(batch).completed == 3)
            await store.database.run(store.batches.cancel, OWNER, batch.id)
            worker.runner.wake()
            ended = await worker.until(batch, "cancelled")
            assert (ended.completed, ended.failed, len(answers.cancelled)) == (3, 7, 7)
            assert not worker.runner._work

    asyncio.run(main())


def test_expired_batch_stops_its_lines_and_ends(store: Store) -> None:
    batch = store.create(5)

    async def main() -> None:
        answers = Answers(is_open=False)
        async with running(store, answers) as worker:
            await answers.until(lambda: len(answers.running) == 5)
            await store.database.run(lambda: store.set_batch(batch, expires_at=0.0))
            worker.runner.wake()
            ended = await worker.until(batch, "expired")
            assert (ended.failed, len(answers.cancelled)) == (5, 5)

    asyncio.run(main())


def test_stopped_runner_stores_its_answers_and_gives_the_other_lines_back(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "FEWEST_IMAGES", LINES_TAKEN * 2)
    batch = store.create(LINES_TAKEN * 2)

    async def main() -> None:
        answers = Answers(is_open=False)
        async with running(store, answers) as worker:
            await answers.until(lambda: len(answers.running) == LINES_TAKEN * 2)
            await answers.permit(5)
            await until(lambda: worker.runner._work[batch.id].num_answered == 5)
        assert store.get(batch).completed == 5
        assert {row.claimed_by for row in store.rows(line_table)} == {None}
        again = Answers()
        async with running(store, again) as worker:
            ended = await worker.until(batch, "completed")
            assert ended.completed == LINES_TAKEN * 2
        assert len(again.started) == LINES_TAKEN * 2 - 5

    asyncio.run(main())


@pytest.mark.parametrize("error", [StorageUnavailable(1), StorageFull()])
def test_answers_wait_for_the_database_and_are_stored_later(
    store: Store, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    batch = store.create(10)
    failures = 0
    write = store.batches.store

    def fail(answers: Sequence[Any]) -> Any:
        nonlocal failures
        if failures < 3:
            failures += 1
            raise error
        return write(answers)

    monkeypatch.setattr(store.batches, "store", fail)

    async def main() -> None:
        answers = Answers()
        async with running(store, answers) as worker:
            ended = await worker.until(batch, "completed")
            assert ended.completed == 10
        assert len(answers.started) == 10  # No line was answered twice.

    asyncio.run(main())
    assert failures == 3


def test_answers_that_wait_for_the_database_are_kept_when_the_batch_is_cancelled(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = store.create(4)
    is_full = True
    write = store.batches.store

    def write_later(answers: Sequence[Any]) -> Any:
        if is_full:
            raise StorageFull
        return write(answers)

    monkeypatch.setattr(store.batches, "store", write_later)

    async def main() -> None:
        nonlocal is_full
        answers = Answers(is_open=False)
        async with running(store, answers) as worker:
            await answers.until(lambda: len(answers.running) == 4)
            await answers.permit(3)
            await until(lambda: len(worker.runner._answers) == 3)
            await store.database.run(store.batches.cancel, OWNER, batch.id)
            worker.runner.wake()
            await until(lambda: len(answers.cancelled) == 1)
            is_full = False
            ended = await worker.until(batch, "cancelled")
            assert (ended.completed, ended.failed) == (3, 1)

    asyncio.run(main())


def test_batch_whose_last_answer_an_earlier_process_stored_ends_at_the_start(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "WATCH_SECONDS", TIMEOUT * 10)
    batch = store.start(3)
    store.batches.beat(is_alone=True)
    store.answer(store.take(batch))
    assert store.get(batch).status == "in_progress"

    async def main() -> None:
        async with running(store, Answers()) as worker:
            assert (await worker.until(batch, "completed")).completed == 3

    asyncio.run(main())


def test_lines_in_memory_are_limited_in_bytes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "MOST_BYTES", 3000)
    monkeypatch.setattr(batches_module, "BYTES_TOGETHER", 1000)
    batches = [store.create(content_of(20, text="x" * 900)) for _ in range(3)]
    before = list[int]()  # the bytes in memory before each claim
    take = store.batches.take

    async def main() -> None:
        answers = Answers(is_open=False)
        async with running(store, answers, full_step=100) as worker:

            def num_bytes() -> int:
                return sum(work.num_bytes for work in list(worker.runner._work.values()))

            def take_and_note(*arguments: Any) -> Any:
                before.append(num_bytes())
                return take(*arguments)

            monkeypatch.setattr(store.batches, "take", take_and_note)
            await until(lambda: num_bytes() >= 3000)
            for _ in range(50):  # in which more lines could be claimed
                await store.database.run(int)
            await answers.permit()
            for batch in batches:
                await worker.until(batch, "completed")
            assert 2000 <= max(before) < 3000
            assert num_bytes() == 0

    asyncio.run(main())


def test_heartbeat_does_not_wait_for_other_work_in_threads(store: Store) -> None:
    may_end = threading.Event()
    store.num_lines()  # creates the database

    async def main() -> None:
        loop = asyncio.get_running_loop()
        others = [loop.run_in_executor(None, may_end.wait, TIMEOUT) for _ in range(100)]
        others += [asyncio.ensure_future(store.database.run(may_end.wait, TIMEOUT)) for _ in range(100)]
        async with running(store, Answers()) as worker, asyncio.timeout(TIMEOUT / 2):
            await worker.runner._is_alive.wait()
            may_end.set()
        await asyncio.gather(*others)

    asyncio.run(main())


def test_stop_waits_for_the_heartbeat(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the database would be closed while the heartbeat uses a connection, which would stay open."""
    started, may_end = threading.Event(), threading.Event()
    has_ended = False
    store.num_lines()  # creates the database

    def beat(**_: Any) -> None:
        nonlocal has_ended
        started.set()
        assert may_end.wait(TIMEOUT)
        has_ended = True

    monkeypatch.setattr(store.batches, "beat", beat)

    async def main() -> None:
        async with running(store, Answers()) as worker:
            await asyncio.to_thread(started.wait, TIMEOUT)
            stop = asyncio.create_task(worker.stop())
            await asyncio.wait([stop], timeout=0.2)
            was_done = stop.done()
            may_end.set()
            await stop
            assert (was_done, has_ended) == (False, True)

    asyncio.run(main())


def test_no_line_is_started_while_many_answers_wait(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "MOST_UNSTORED", 20)
    batch = store.create(200)
    may_store = threading.Event()
    write = store.batches.store

    def wait(answers: Sequence[Any]) -> Any:
        assert may_store.wait(TIMEOUT)
        return write(answers)

    monkeypatch.setattr(store.batches, "store", wait)

    async def main() -> None:
        answers = Answers()
        async with running(store, answers) as worker:
            try:
                await answers.until(lambda: len(answers.started) > 20 and not answers.running)
                assert len(answers.started) <= 20 + FEWEST_IMAGES
            finally:
                may_store.set()
            await worker.until(batch, "completed")

    asyncio.run(main())


@pytest.mark.parametrize("method", ["take", "store", "end_if_done", "validate", "active"])
def test_lost_result_of_a_transaction_delays_a_batch_only(
    store: Store, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The connection breaks after the commit, so that the runner does not know that it has succeeded."""
    batch = store.create(LINES_TAKEN + 3)
    original = getattr(store.batches, method)
    is_lost = False

    def lose(*arguments: Any) -> Any:
        nonlocal is_lost
        result = original(*arguments)
        if not is_lost:
            is_lost = True
            raise StorageUnavailable(1)
        return result

    monkeypatch.setattr(store.batches, method, lose)
    monkeypatch.setattr(runner_module, "CLEAN_SECONDS", 0.05)

    async def main() -> None:
        async with running(store, Answers()) as worker:
            ended = await worker.until(batch, "completed")
            assert ended.completed == LINES_TAKEN + 3

    asyncio.run(main())
    assert is_lost


def test_batch_that_is_cancelled_while_its_lines_are_taken_ends(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = store.start(5)
    taken, may_return = threading.Event(), threading.Event()
    take = store.batches.take

    def wait(*arguments: Any) -> Sequence[Line]:
        found = take(*arguments)
        taken.set()
        assert may_return.wait(TIMEOUT)
        return found

    monkeypatch.setattr(store.batches, "take", wait)

    async def main() -> None:
        answers = Answers()
        async with running(store, answers) as worker:
            await asyncio.to_thread(taken.wait, TIMEOUT)
            await store.database.run(store.batches.cancel, OWNER, batch.id)
            worker.runner.wake()
            await until(lambda: not worker.runner._work)
            may_return.set()
            ended = await worker.until(batch, "cancelled")
            assert (ended.failed, answers.started) == (5, [])

    asyncio.run(main())


# Two workers


@pytest.fixture
def pair(workers: Callable[[], Store]) -> Iterator[tuple[Store, Store]]:
    yield workers(), workers()


def test_two_runners_share_a_batch(pair: tuple[Store, Store]) -> None:
    batch = pair[0].create(200, webhook_url=HOOK)

    async def main() -> None:
        first, second = Answers(is_open=False), Answers(is_open=False)
        async with running(pair[0], first) as worker, running(pair[1], second):
            await until(lambda: first.running and second.running)
            await first.permit()
            await second.permit()
            await until(lambda: pair[0].get(batch).status == "completed")
            assert worker.store.get(batch).completed == 200
        keys = [line.key for line in first.started + second.started]
        assert len(keys) == len(set(keys)) == 200

    asyncio.run(main())
    assert pair[0].events() == [(batch.id, "batch.completed")]


def test_runner_does_not_search_again_and_again_while_another_one_validates(
    pair: tuple[Store, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "WATCH_SECONDS", 0.2)
    batch = pair[0].create(1)
    pair[0].batches.beat(is_alone=False)
    assert pair[0].batches._claim(batch.id)
    looks, third = 0, threading.Event()
    active = pair[1].batches.active

    def count() -> Any:
        nonlocal looks
        looks += 1
        if looks == 3:
            third.set()
        return active()

    monkeypatch.setattr(pair[1].batches, "active", count)

    async def main() -> None:
        async with running(pair[1], Answers()):
            loop = asyncio.get_running_loop()
            start = loop.time()
            await asyncio.to_thread(third.wait, TIMEOUT)
            assert loop.time() - start > 0.3  # The runner waited twice.

    asyncio.run(main())


def test_runner_takes_the_lines_of_a_dead_one_after_its_lease(pair: tuple[Store, Store]) -> None:
    dead, alive = pair
    batch = dead.start(5)
    dead.batches.beat(is_alone=False)
    assert len(dead.take(batch)) == 5

    async def main() -> None:
        answers = Answers()
        async with running(alive, answers) as worker:
            await until(lambda: batch.id in worker.runner._work)
            assert answers.started == []
            await alive.database.run(pause, dead, LEASE_SECONDS + 1)
            await worker.until(batch, "completed")
            assert len(answers.started) == 5

    asyncio.run(main())


def test_batch_that_another_worker_cancelled_stops_here(pair: tuple[Store, Store]) -> None:
    batch = pair[0].start(5)

    async def main() -> None:
        answers = Answers(is_open=False)
        async with running(pair[0], answers) as worker:
            await answers.until(lambda: len(answers.running) == 5)
            await pair[1].database.run(pair[1].batches.cancel, OWNER, batch.id)
            await worker.until(batch, "cancelled")
            assert len(answers.cancelled) == 5

    asyncio.run(main())


def test_runner_whose_engine_has_failed_leaves_its_lines_to_another_one(pair: tuple[Store, Store]) -> None:
    batch = pair[0].start(5)

    async def main() -> None:
        stuck, answers = Answers(is_open=False), Answers()
        async with running(pair[0], stuck) as broken:
            await stuck.until(lambda: len(stuck.running) == 5)
            broken.can_answer = False
            async with running(pair[1], answers) as healthy:
                await healthy.until(batch, "completed")
        assert (len(stuck.cancelled), len(answers.started)) == (5, 5)

    asyncio.run(main())
