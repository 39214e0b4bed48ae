"""The runner: answers the lines of batches in the background. It has six loops in the event loop of the service.

    beat    records that this worker is alive
    watch   finds new batches, and ends those that are cancelled or expired
    check   validates new batches, one after the other
    feed    claims waiting lines and starts their answers
    store   stores answers, as many as there are in one transaction
    clean   deletes what has expired

Feed keeps enough lines in progress for two full steps of the engine. Batches share this fairly: each
has an equal part of the lines in progress, and the next line is that of the batch for which the fewest network
evaluations were computed. A new batch begins with the smallest number of evaluations of the others.

The memory of the lines that are claimed or in progress is limited, too, because a line can have pictures.

If the database does not answer or is full, the answers wait, no further line is started, and the runner tries again. If
the process is killed, its claims end: with SQLite at the next start, and with PostgreSQL after LEASE_SECONDS, when
another worker notices it. The lines get the same seeds, and therefore the same images. If the engine has failed for
good, the runner gives up its claims, so that another worker can answer the lines.
"""

import asyncio
import json
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from app.batches.batches import LEASE_SECONDS, ActiveBatch, Batches
from app.batches.database import RETRY_SECONDS, Database
from app.batches.lines import num_images_of
from app.batches.rates import Rates
from app.batches.records import BatchStatus, Line, LineAnswer
from app.errors import InternalError, StorageFull, StorageUnavailable
from app.metrics import Metrics

log = logging.getLogger(__name__)

WATCH_SECONDS = LEASE_SECONDS / 10  # between two reads of a database that other workers change too
CLEAN_SECONDS = 60.0  # between two deletions of what has expired
LINES_TAKEN = 32  # lines that are claimed together
FEWEST_IMAGES = 32  # in progress, even if full steps are small
MOST_BYTES = 64 * 1024 * 1024  # of lines that are claimed or in progress; no line is claimed beyond this
MOST_UNSTORED = 256  # answers that wait for the database; no line is started beyond this number
UNANSWERED = {"error": {"message": InternalError.detail, "type": "server_error", "code": InternalError.code}}


@dataclass(eq=False, slots=True)
class Work:
    """The work of this process on one batch."""

    batch: ActiveBatch
    # The evaluations that were computed for it, an estimate for its lines in progress, and the value at its beginning.
    evaluations: float = 0.0
    num_computed: int = 0  # evaluations that were computed for it
    lines: deque[Line] = field(default_factory=deque)  # claimed and not started
    running: dict[int, "asyncio.Task[None]"] = field(default_factory=dict)  # by the number of the line
    num_images: int = 0  # of the lines in progress
    num_bytes: int = 0  # of the lines that are claimed or in progress
    num_answered: int = 0
    is_exhausted: bool = False  # True if the last search found no waiting line

    @property
    def mean_evaluations(self) -> float:
        """Returns the mean number of evaluations of a line, or 0 if it is not known yet."""
        return self.num_computed / max(self.num_answered, 1)


class BatchRunner:
    """Answers the lines of batches. Only the event loop may use it."""

    def __init__(
        self,
        database: Database,
        batches: Batches,
        answer: Callable[[Line], Awaitable[LineAnswer]],
        full_step: Callable[[], int],
        can_answer: Callable[[], bool],
        rates: Rates,
        metrics: Metrics,
        on_end: Callable[[], None],
    ) -> None:
        """`answer` answers a line. `full_step` returns the number of rows of a full step of the engine.

        `can_answer` returns False if the engine has failed for good. `on_end` is called when batches may have ended, so
        that their webhooks are sent at once.
        """
        self._database, self._batches, self._answer_line = database, batches, answer
        self._full_step, self._can_answer = full_step, can_answer
        self._rates, self._metrics, self._on_end = rates, metrics, on_end
        self._work = dict[str, Work]()
        self._answers: list[tuple[Line, LineAnswer]] = []  # that are not stored yet
        self._num_storing, self._storing = 0, asyncio.Lock()
        self._new = deque[str]()  # the batches that are to be validated
        self._is_woken, self._may_feed, self._has_answers = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._has_new = asyncio.Event()
        self._waiting = set[Callable[[], Awaitable[None]]]()  # the loops whose last use of the database has failed
        self._has_database, self._is_alive = asyncio.Event(), asyncio.Event()

    def wake(self) -> None:
        """Makes the runner read the batches now."""
        self._is_woken.set()

    async def run(self) -> None:
        """Runs until it is cancelled. Then stores the answers that are known, and releases the other lines."""
        try:
            async with asyncio.TaskGroup() as group:
                for loop in (self._beat, self._watch, self._check, self._feed, self._store, self._clean):
                    group.create_task(self._repeat(loop))
        finally:
            await self._stop()

    async def _repeat(self, loop: Callable[[], Awaitable[None]]) -> None:
        """Calls a loop again and again. An error of the database only delays it."""
        while True:
            try:
                await loop()
                self._waiting.discard(loop)
            except (StorageUnavailable, StorageFull) as error:
                if not self._waiting:
                    log.warning("Batches wait for the database", extra={"error": error.detail})
                self._waiting.add(loop)
                await asyncio.sleep(RETRY_SECONDS)
            except Exception:  # A bug must not end the other loops.
                log.exception("Error in the batch runner, which continues")
                await asyncio.sleep(RETRY_SECONDS)

    async def _beat(self) -> None:
        """Records that this worker is alive.

        Without other workers, one record at the start is enough. It releases the claims of an earlier process.
        """
        if not self._database.exists:
            await self._has_database.wait()
        await self._database.run_undelayed(partial(self._batches.beat, is_alone=not self._database.is_shared))
        self._is_alive.set()
        if not self._database.is_shared:
            await asyncio.Event().wait()
        await asyncio.sleep(WATCH_SECONDS)

    async def _clean(self) -> None:
        """Deletes what has expired."""
        if self._database.exists:
            await self._database.run(self._batches.clean)
        await asyncio.sleep(CLEAN_SECONDS)

    async def _watch(self) -> None:
        self._is_woken.clear()
        if self._database.exists:
            self._has_database.set()
            await self._is_alive.wait()
            active = await self._database.run(self._batches.active)
            self._metrics.unfinished_batches.set(len(active))
            answered = {each.id: each for each in active if each.is_answered and self._can_answer()}
            for batch in answered.values():
                await self._continue(batch)
            left = {each.id for each in active if each.status is not BatchStatus.VALIDATING} | self._work.keys()
            for batch_id in left - answered.keys():
                await self._leave(batch_id)
            self._may_feed.set()
            self._new = deque(each.id for each in active if each.status is BatchStatus.VALIDATING)
            self._has_new.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(WATCH_SECONDS if self._database.is_shared else CLEAN_SECONDS):
                await self._is_woken.wait()

    async def _check(self) -> None:
        """Validates one batch, or waits until there is one. A batch that cannot be read does not delay the others."""
        if not self._new:
            self._has_new.clear()
            await self._has_new.wait()
        elif await self._database.run(self._batches.validate, self._new.popleft()):
            self.wake()
            self._on_end()

    async def _continue(self, batch: ActiveBatch) -> None:
        """Begins the work on a batch, or searches again for waiting lines, which another worker may have left."""
        work = self._work.get(batch.id)
        if work is None:
            if await self._end_if_done(batch.id):  # An earlier process has answered its last line.
                return
            fewest = min((each.evaluations for each in self._work.values()), default=0.0)
            self._work[batch.id] = Work(batch, fewest)
            self._rates.start(batch.id)
        elif work.is_exhausted:
            if not (work.running or work.lines or self._is_unstored(batch.id)):
                # There can be claims of a transaction that was committed, but whose result was lost.
                await self._database.run(self._batches.release, batch.id)
                await self._end_if_done(batch.id)
            work.is_exhausted = False

    def _is_unstored(self, batch_id: str) -> bool:
        """Returns True if answers of the batch are not stored yet."""
        return self._num_storing > 0 or any(line.batch_id == batch_id for line, _ in self._answers)

    async def _leave(self, batch_id: str) -> None:
        """Stops the work on a batch whose lines are not to be answered here. Ends it if it is to end and can.

        Answers that exist are stored before the claims of their lines end.
        """
        work = self._work.pop(batch_id, None)
        if work:
            tasks = list(work.running.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await self._store_answers()
        await self._database.run(self._batches.release, batch_id)
        await self._end_if_done(batch_id)

    async def _end_if_done(self, batch_id: str) -> bool:
        """Ends a batch if it can end. Returns True if it has ended."""
        if not await self._database.run(self._batches.end_if_done, batch_id):
            return False
        self._work.pop(batch_id, None)
        self._rates.end(batch_id)
        self._on_end()
        self.wake()
        return True

    async def _feed(self) -> None:
        """Starts one line, or waits until a line can be started."""
        self._may_feed.clear()
        work = await self._next()
        if work is None:
            await self._may_feed.wait()
            return
        line = work.lines.popleft()
        images, cost = num_images_of(line.body), work.mean_evaluations
        work.num_images += images
        work.evaluations += cost
        task = asyncio.create_task(self._answer(work, line, images, cost))
        work.running[line.number] = task
        await asyncio.sleep(0)  # so that other tasks run between the lines

    async def _next(self) -> Work | None:
        """Returns the work with the line that is to be started next, or None if none may be started now."""
        most = max(FEWEST_IMAGES, 2 * self._full_step())
        unfed = [each for each in self._work.values() if each.lines or not each.is_exhausted]
        if not unfed or len(self._answers) + self._num_storing > MOST_UNSTORED:
            return None
        if sum(each.num_images for each in self._work.values()) >= most:
            return None
        count = max(1, min(LINES_TAKEN, most // len(unfed)))  # Many batches keep few claimed lines each.
        is_full = sum(each.num_bytes for each in self._work.values()) >= MOST_BYTES
        for work in sorted(unfed, key=lambda each: each.evaluations):
            if self._work.get(work.batch.id) is not work:  # It was cancelled while the loop waited.
                continue
            if work.num_images >= max(1, most // len(unfed)):
                continue
            if not work.lines and is_full:
                continue
            if not work.lines:
                taken = await self._database.run(self._batches.take, work.batch, count)
                work.is_exhausted = not taken
                if self._work.get(work.batch.id) is not work:  # It was cancelled meanwhile.
                    await self._database.run(self._batches.release, work.batch.id)
                    self.wake()
                    continue
                work.lines.extend(taken)
                work.num_bytes += sum(len(line.body) for line in taken)
            if work.lines:
                return work
        return None

    async def _answer(self, work: Work, line: Line, images: int, cost: float) -> None:
        """Answers a line. If the task is cancelled, the line is not answered."""
        try:
            answer = await self._answer_line(line)
        except Exception:  # A bug in a route is the error of one line.
            log.exception("A line was not answered", extra={"batch": line.batch_id, "line": line.number})
            answer = LineAnswer(InternalError.status, "", json.dumps(UNANSWERED).encode(), 0, 0)
        finally:
            del work.running[line.number]
            work.num_images -= images
            work.num_bytes -= len(line.body)
            work.evaluations -= cost
            self._may_feed.set()
        work.evaluations += answer.evaluations
        work.num_computed += answer.evaluations
        work.num_answered += 1
        self._answers.append((line, answer))
        self._has_answers.set()

    async def _store(self) -> None:
        await self._has_answers.wait()
        self._has_answers.clear()
        await self._store_answers()

    async def _store_answers(self) -> None:
        """Stores the answers that are known. If it fails, they are kept."""
        async with self._storing:
            answers, self._answers = self._answers, []
            if not answers:
                return
            self._num_storing = len(answers)
            try:
                stored = await self._database.run(self._batches.store, answers)
            except BaseException:
                self._answers = answers + self._answers
                self._has_answers.set()
                raise
            finally:
                self._num_storing = 0
        self._may_feed.set()
        self._metrics.batch_lines.labels("completed").inc(stored.completed)
        self._metrics.batch_lines.labels("failed").inc(stored.failed)
        of_batch = dict[str, list[int]]()
        for line, answer in answers:
            counts = of_batch.setdefault(line.batch_id, [0, 0])
            counts[0] += 1
            counts[1] += answer.images
        for batch_id, (lines, images) in of_batch.items():
            self._rates.add(batch_id, lines, images)
        for batch_id in stored.ready:
            await self._end_if_done(batch_id)

    async def _stop(self) -> None:
        """Cancels the lines in progress, stores the answers that are known, and releases the other lines."""
        tasks = [task for work in self._work.values() for task in work.running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if not self._database.exists:
            return
        answers, self._answers = self._answers, []

        def store() -> None:
            if answers:
                self._batches.store(answers)
            self._batches.release()

        try:
            await self._database.run(store)
        except (StorageUnavailable, StorageFull):
            if tasks or answers:
                log.warning(
                    "Lines in progress not released: they are answered after the next start or by another process"
                )
