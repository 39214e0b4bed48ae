"""Batches: their states and their lines, as transactions of the database.

A batch is `validating` while its lines are read from the input file and stored, and then `in_progress`. A worker (a
process) claims lines, answers them and stores the results. A result is stored only for a line that waits and that its
worker has claimed, in one transaction with the counts of the batch. No line therefore has two results, even if a worker
continues after a pause in which another one has taken its lines.

    validating --> in_progress --> completed          every line has a result
        |               |--------> expired            the completion window has ended; the other lines have failed
        |               `--------> cancelling --> cancelled
        |--> failed                                   a line is invalid: no line is answered
        `--> cancelled

The transaction that ends a batch also creates its files, and the event of its webhook.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from app.batches.database import Database
from app.batches.files import Limits, check_stored, clean_files, lock_quota, new_id, page, result_pages, uploaded_blocks
from app.batches.lines import InputLine, InputReader
from app.batches.rates import Rates
from app.batches.records import (
    COMPLETION_SECONDS,
    OUTPUT,
    UNFINISHED,
    Batch,
    BatchError,
    BatchStatus,
    Line,
    LineAnswer,
    NewBatch,
)
from app.batches.tables import batches, files, lines, webhooks, workers
from app.batches.webhooks import event_row
from app.errors import Conflict, FieldError, NotFound, QuotaExceeded

log = logging.getLogger(__name__)

MOST_UNFINISHED, MOST_BATCHES = 100, 10_000  # unfinished batches of an owner, and all that are not deleted yet
LINES_TOGETHER = 500  # lines that are stored in one transaction
BYTES_TOGETHER = 4 * 1024 * 1024  # their bodies; a block ends with the line that exceeds this
LEASE_SECONDS = 30  # a worker that has not been seen for this long has lost its claims
NOT_FOUND = "No batch with this id exists"
DELETED = "The output file of this batch was deleted or has expired"
NO_FILE = "No file with this id exists. Upload one with POST /v1/files"
ENDED = {  # status of a batch that ends without an answer to every line -> code and message of these lines
    BatchStatus.EXPIRED: ("batch_expired", "The line was not answered within the completion window"),
    BatchStatus.CANCELLED: ("batch_cancelled", "The batch was cancelled before the line was answered"),
}
TIMES = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")


@dataclass(frozen=True, slots=True)
class ActiveBatch:
    """An unfinished batch, with what a worker needs to know about it."""

    id: str
    endpoint: str
    status: BatchStatus
    is_expired: bool

    @property
    def is_answered(self) -> bool:
        """Returns True if the lines of the batch are to be answered."""
        return self.status is BatchStatus.IN_PROGRESS and not self.is_expired


@dataclass(frozen=True, slots=True)
class StoredCounts:
    """What a transaction with results has stored."""

    completed: int
    failed: int
    images: int
    ready: tuple[str, ...]  # the batches all of whose lines have a result


class Batches:
    """The batches of all owners. Its methods block. They raise StorageUnavailable and StorageFull."""

    def __init__(
        self,
        database: Database,
        limits: Limits,
        endpoints: Collection[str],
        check_webhook: Callable[[str], None],
        rates: Rates,
    ) -> None:
        """`check_webhook` raises FieldError if an event must not be sent to a URL."""
        self._database, self._limits, self._endpoints = database, limits, endpoints
        self._check_webhook, self.rates = check_webhook, rates
        self.is_stopping = threading.Event()  # ends a validation early

    def create(self, owner: str, new: NewBatch) -> Batch:
        """Creates a batch. Raises FieldError, or QuotaExceeded if the owner has too many batches or bytes."""
        if new.endpoint not in self._endpoints:
            raise FieldError("endpoint", f"Input should be one of {', '.join(sorted(self._endpoints))}")
        if new.webhook_url is not None:
            self._check_webhook(new.webhook_url)
        batch_id, now = new_id("batch_"), time.time()
        with self._database.write() as connection:
            lock_quota(connection, owner)
            owned = sa.select(sa.func.count()).where(batches.c.owner == owner, batches.c.status.in_(UNFINISHED))
            if (connection.scalar(owned) or 0) >= MOST_UNFINISHED:
                raise QuotaExceeded(f"The limit of {MOST_UNFINISHED} unfinished batches is reached. Retry later")
            if (connection.scalar(sa.select(sa.func.count()).where(batches.c.owner == owner)) or 0) >= MOST_BATCHES:
                raise QuotaExceeded(f"The limit of {MOST_BATCHES} batches is reached. Old ones are deleted by and by")
            file = sa.select(files.c.bytes).where(
                files.c.id == new.input_file_id,
                files.c.owner == owner,
                files.c.status == "processed",
                files.c.expires_at > now,
            )
            file = file.with_for_update()  # A deletion at the same time waits, and then finds the batch.
            num_bytes = connection.scalar(file)
            if num_bytes is None:
                raise FieldError("input_file_id", NO_FILE)
            check_stored(connection, owner, self._limits, more=num_bytes)
            connection.execute(
                batches.insert().values(
                    id=batch_id,
                    owner=owner,
                    endpoint=new.endpoint,
                    input_file_id=new.input_file_id,
                    status=BatchStatus.VALIDATING,
                    metadata=new.metadata,
                    output_lifetime=new.output_lifetime,
                    webhook_url=new.webhook_url,
                    input_bytes=num_bytes,
                    created_at=now,
                    expires_at=now + COMPLETION_SECONDS,
                )
            )
            return self._batch_of(_row(connection, owner, batch_id))

    def get(self, owner: str, batch_id: str) -> Batch:
        """Returns a batch. Raises NotFound."""
        with self._database.read() as connection:
            return self._batch_of(_row(connection, owner, batch_id))

    def list(self, owner: str, *, after: str | None = None, limit: int) -> tuple[list[Batch], bool]:
        """Returns at most `limit` batches that are older than `after`, newest first, and True if there are more.

        Raises FieldError if no batch has the id `after`.
        """
        query = sa.select(batches).where(batches.c.owner == owner)
        with self._database.read() as connection:
            try:
                last = _row(connection, owner, after) if after else None
            except NotFound:
                raise FieldError("after", NOT_FOUND) from None
            rows, has_more = page(connection, query, batches, last, limit, newest_first=True)
        return [self._batch_of(row) for row in rows], has_more

    def cancel(self, owner: str, batch_id: str) -> Batch:
        """Cancels a batch. Raises NotFound, and Conflict if the batch has ended.

        Workers notice it, and end the batch when none of its lines is being answered.
        """
        now = time.time()
        with self._database.write() as connection:
            row = _row(connection, owner, batch_id, lock=True)
            status = BatchStatus(row.status)
            if status not in UNFINISHED:
                raise Conflict(f"The batch has ended with the status {status}")
            if status is BatchStatus.VALIDATING:
                _delete_lines(connection, batch_id)
                self._end(connection, row, BatchStatus.CANCELLED, cancelling_at=now)
            elif status is BatchStatus.IN_PROGRESS:
                _update(connection, batch_id, status=BatchStatus.CANCELLING, cancelling_at=now)
            return self._batch_of(_row(connection, owner, batch_id))

    def answers(self, owner: str, batch_id: str) -> Iterator[tuple[Line, bytes]]:
        """Returns the lines that succeeded so far, in order, with the body of the response.

        Raises NotFound, also if the output file was deleted. The iterator raises it if that happens meanwhile.
        """

        def checked() -> Batch:
            batch = self.get(owner, batch_id)
            if batch.status not in UNFINISHED and batch.completed and not batch.output_file_id:
                raise NotFound(DELETED)
            return batch

        def read(endpoint: str) -> Iterator[tuple[Line, bytes]]:
            for rows, results in result_pages(self._database, batch_id, "completed"):
                for row, result in zip(rows, results, strict=True):
                    body = json.dumps(json.loads(result)["response"]["body"]).encode()
                    yield Line(batch_id, row.number, row.custom_id, endpoint, b""), body
            checked()  # Lines whose results were deleted are missing.

        return read(checked().endpoint)

    # The methods below are for workers.

    def beat(self, *, is_alone: bool) -> None:
        """Records that this worker is alive, and ends the claims of workers that are not.

        `is_alone` means that no other worker can exist.
        """
        with self._database.write() as connection:
            now = _now(connection)
            seen = workers.update().where(workers.c.id == self._database.worker).values(seen_at=now)
            if not connection.execute(seen).rowcount:
                connection.execute(workers.insert().values(id=self._database.worker, seen_at=now))
            dead = workers.delete().where(workers.c.id != self._database.worker)
            if not is_alone:
                dead = dead.where(workers.c.seen_at < now - LEASE_SECONDS)
            connection.execute(dead)
            # A worker that was paused for longer may have been deleted here, and may have made claims after that.
            alive = sa.select(workers.c.id)
            for table in (lines, batches):
                lost = table.update().where(table.c.claimed_by.is_not(None), table.c.claimed_by.not_in(alive))
                count = connection.execute(lost.values(claimed_by=None)).rowcount
                if count and table is lines:
                    log.info("Lines of a process that has ended are answered again", extra={"lines": count})

    def release(self, batch_id: str | None = None) -> None:
        """Ends the claims of this worker on a batch and its lines, or all of its claims."""
        with self._database.write() as connection:
            _release(connection, self._database.worker, batch_id)

    def active(self) -> Sequence[ActiveBatch]:
        """Returns the unfinished batches, the oldest first."""
        columns = (batches.c.id, batches.c.endpoint, batches.c.status, batches.c.expires_at)
        query = sa.select(*columns).where(batches.c.status.in_(UNFINISHED)).order_by(batches.c.created_at)
        with self._database.read() as connection:
            now = time.time()
            return [
                ActiveBatch(row.id, row.endpoint, BatchStatus(row.status), row.expires_at <= now)
                for row in connection.execute(query).all()
            ]

    def validate(self, batch_id: str) -> bool:
        """Reads the input file, and stores its lines. The batch is then in progress, or has failed.

        Ends early if the batch is cancelled, and at a shutdown. Returns False if there was nothing to validate, such as
        when another worker validates the batch.
        """
        row = self._claim(batch_id)
        if row is None:
            return False
        reader = InputReader(row.endpoint, self._limits.lines, self._endpoints)
        block, size = list[InputLine](), 0
        for line in reader.read(uploaded_blocks(self._database, row.input_file_id)):
            if self.is_stopping.is_set():
                return True
            if reader.errors:
                continue
            block.append(line)
            size += len(line.body)
            if len(block) == LINES_TOGETHER or size >= BYTES_TOGETHER:
                if not self._add_lines(batch_id, block):
                    return True
                block, size = [], 0
        if self._add_lines(batch_id, block):
            self._start(batch_id, reader)
        return True

    def take(self, batch: ActiveBatch, count: int) -> Sequence[Line]:
        """Claims waiting lines of a batch in progress, in order, and returns them.

        Takes at most `count` lines, and no more than fit into BYTES_TOGETHER, but at least one.
        """
        # The lock keeps the status until the claims are stored, so that no line is claimed after `cancel`.
        status = sa.select(batches.c.status).where(batches.c.id == batch.id).with_for_update(read=True)
        waiting = (
            sa.select(lines.c.number, sa.func.length(lines.c.body).label("size"))
            .where(lines.c.batch_id == batch.id, lines.c.state == "waiting", lines.c.claimed_by.is_(None))
            .order_by(lines.c.number)
            .limit(count)
            .with_for_update(skip_locked=True)
        )
        with self._database.write() as connection:
            if connection.scalar(status) != BatchStatus.IN_PROGRESS:
                return []
            numbers, size = list[int](), 0
            for row in connection.execute(waiting):
                size += row.size
                if numbers and size > BYTES_TOGETHER:
                    break
                numbers.append(row.number)
            taken = (lines.c.batch_id == batch.id, lines.c.number.in_(numbers))
            connection.execute(lines.update().where(*taken).values(claimed_by=self._database.worker))
            of_lines = sa.select(lines.c.number, lines.c.custom_id, lines.c.body).where(*taken)
            rows = connection.execute(of_lines.order_by(lines.c.number)).all()
        return [Line(batch.id, row.number, row.custom_id, batch.endpoint, bytes(row.body)) for row in rows]

    def store(self, answers: Sequence[tuple[Line, LineAnswer]]) -> StoredCounts:
        """Stores the answers of lines that this worker has claimed. Answers of other lines are dropped."""
        of_batch = dict[str, list[int]]()  # id -> completed, failed, images, bytes
        with self._database.write() as connection:
            for line, answer in sorted(answers, key=lambda pair: (pair[0].batch_id, pair[0].number)):
                result, is_ok = result_of(line, answer), 200 <= answer.status < 300
                own = (lines.c.state == "waiting", lines.c.claimed_by == self._database.worker)
                of_line = (lines.c.batch_id == line.batch_id, lines.c.number == line.number)
                values = {
                    "state": "completed" if is_ok else "failed",
                    "claimed_by": None,
                    "result": result,
                    "body": b"",
                }
                if connection.execute(lines.update().where(*of_line, *own).values(values)).rowcount:
                    counts = of_batch.setdefault(line.batch_id, [0, 0, 0, 0])
                    counts[0 if is_ok else 1] += 1
                    counts[2] += answer.images if is_ok else 0
                    counts[3] += len(result) + 1
            ready = [each for each, counts in of_batch.items() if self._count(connection, each, counts)]
        completed, failed, images = (sum(counts[i] for counts in of_batch.values()) for i in range(3))
        return StoredCounts(completed, failed, images, tuple(ready))

    def end_if_done(self, batch_id: str) -> bool:
        """Ends a batch if all lines have a result, or if it is cancelled or has expired. Returns True if it has ended.

        A batch ends only when no worker answers a line of it.
        """
        while True:
            with self._database.write() as connection:
                query = sa.select(batches).where(batches.c.id == batch_id).with_for_update()
                row = connection.execute(query).first()
                if row is None or BatchStatus(row.status) not in UNFINISHED:
                    return True
                status = _end_of(row)
                if status is None or _num_running(connection, batch_id):
                    return False
                if status is BatchStatus.COMPLETED or not _fail_waiting(connection, row, status):
                    row = connection.execute(query).one()
                    self._end(connection, row, status)
                    return True

    def clean(self) -> None:
        """Deletes expired files, and batches that have ended, are old and have no files."""
        clean_files(self._database)
        old = batches.c.created_at < time.time() - self._limits.lifetime
        kept = sa.select(files.c.batch_id).where(files.c.batch_id.is_not(None))
        query = sa.select(batches.c.id).where(old, batches.c.status.not_in(UNFINISHED), batches.c.id.not_in(kept))
        while True:
            with self._database.write() as connection:
                batch_id = connection.scalar(query.limit(1))
                if batch_id is None:
                    return
                _delete_lines(connection, batch_id)
                connection.execute(batches.delete().where(batches.c.id == batch_id))

    def _claim(self, batch_id: str) -> Row[Any] | None:
        """Claims a batch that is to be validated, and deletes the lines of a validation that has not ended.

        Returns None if there is nothing to claim.
        """
        with self._database.write() as connection:
            free = sa.or_(batches.c.claimed_by.is_(None), batches.c.claimed_by == self._database.worker)
            of_batch = (batches.c.id == batch_id, batches.c.status == BatchStatus.VALIDATING, free)
            claim = batches.update().where(*of_batch).values(claimed_by=self._database.worker)
            if not connection.execute(claim).rowcount:
                return None
            _delete_lines(connection, batch_id)
            return connection.execute(sa.select(batches).where(batches.c.id == batch_id)).one()

    def _add_lines(self, batch_id: str, block: Sequence[InputLine]) -> bool:
        """Stores lines. Returns False if the batch is not being validated by this worker any more.

        The lines in the table are then those of another worker, or were deleted by `cancel`.
        """
        with self._database.write() as connection:
            if not _is_validated_by(connection, batch_id, self._database.worker):
                return False
            values = [
                {"batch_id": batch_id, "number": each.number, "custom_id": each.custom_id, "body": each.body}
                for each in block
            ]
            if values:
                connection.execute(lines.insert().values(state="waiting"), values)
        return True

    def _start(self, batch_id: str, reader: InputReader) -> None:
        """Changes a batch whose file was read to `in_progress`, or to `failed` if there are errors."""
        with self._database.write() as connection:
            row = _is_validated_by(connection, batch_id, self._database.worker)
            if row is not None and reader.errors:
                _delete_lines(connection, batch_id)
                self._end(connection, row, BatchStatus.FAILED, errors=[asdict(each) for each in reader.errors])
            elif row is not None:
                log.info("Batch started", extra={"batch": batch_id, "lines": reader.num_lines})
                now, status = time.time(), BatchStatus.IN_PROGRESS
                _update(
                    connection, batch_id, status=status, in_progress_at=now, total=reader.num_lines, claimed_by=None
                )

    def _count(self, connection: Connection, batch_id: str, counts: Sequence[int]) -> bool:
        """Adds to the counts of a batch. Returns True if all of its lines have a result."""
        table = batches.c
        names = (table.completed, table.failed, table.images, table.result_bytes)
        values: Any = {column: column + count for column, count in zip(names, counts, strict=True)}
        query = batches.update().where(table.id == batch_id).values(values)
        row = connection.execute(query.returning(table.completed + table.failed, table.total)).one()
        return bool(row[0] >= row[1])

    def _end(self, connection: Connection, row: Row[Any], status: BatchStatus, **values: Any) -> None:
        """Ends a batch: creates its files, and the event of its webhook. The row must be up to date."""
        now = time.time()
        lifetime = row.output_lifetime or self._limits.lifetime
        for state, column in (("completed", "output_file_id"), ("failed", "error_file_id")):
            of_state = (lines.c.batch_id == row.id, lines.c.state == state)
            size = sa.select(sa.func.count(), sa.func.sum(sa.func.length(lines.c.result) + 1)).where(*of_state)
            count, num_bytes = connection.execute(size).one()
            if count:
                values[column] = _add_file(connection, row, state, int(num_bytes), now, now + lifetime)
        if status is BatchStatus.COMPLETED:
            values["finalizing_at"] = now
        values |= {f"{status}_at": now, "claimed_by": None, "input_bytes": 0}
        _update(connection, row.id, status=status, **values)
        facts = {"batch": row.id, "status": str(status), "completed": row.completed, "failed": row.failed}
        log.info("Batch ended", extra=facts)
        if row.webhook_url:
            connection.execute(webhooks.insert().values(**event_row(row.id, f"batch.{status}", row.webhook_url, now)))

    def _batch_of(self, row: Row[Any]) -> Batch:
        times = {f"{name}_at": _seconds(getattr(row, f"{name}_at")) for name in TIMES}
        rate = self.rates.of(row.id) if row.status == BatchStatus.IN_PROGRESS else None
        left = row.total - row.completed - row.failed
        return Batch(
            id=row.id,
            owner=row.owner,
            endpoint=row.endpoint,
            input_file_id=row.input_file_id,
            status=BatchStatus(row.status),
            metadata=row.metadata,
            errors=tuple(BatchError(**error) for error in row.errors or ()),
            created_at=int(row.created_at),
            expires_at=int(row.expires_at),
            **times,
            output_file_id=row.output_file_id,
            error_file_id=row.error_file_id,
            total=row.total,
            completed=row.completed,
            failed=row.failed,
            images=row.images,
            images_per_second=rate.images if rate else None,
            seconds_left=left / rate.lines if rate else None,
        )


def result_of(line: Line, answer: LineAnswer) -> bytes:
    """Returns the line of the output or error file for an answer."""
    response = b'{"status_code": %d, "request_id": %s, "body": %s}' % (
        answer.status,
        json.dumps(answer.request_id).encode(),
        answer.body,
    )
    return _result(line.batch_id, line.number, line.custom_id, response, b"null")


def request_id_of(batch_id: str, number: int) -> str:
    """Returns the id of the result of a line. It is the same each time that the line is answered."""
    return "batch_req_" + sha256(f"{batch_id}_{number}".encode()).hexdigest()[:24]


def _unanswered(batch_id: str, number: int, custom_id: str, code: str, message: str) -> bytes:
    """Returns the line of the error file for a line without an answer."""
    error = json.dumps({"code": code, "message": message}).encode()
    return _result(batch_id, number, custom_id, b"null", error)


def _result(batch_id: str, number: int, custom_id: str, response: bytes, error: bytes) -> bytes:
    return b'{"id": "%s", "custom_id": %s, "response": %s, "error": %s}' % (
        request_id_of(batch_id, number).encode(),
        json.dumps(custom_id).encode(),
        response,
        error,
    )


def _end_of(row: Row[Any]) -> BatchStatus | None:
    """Returns the status with which an unfinished batch can end now, or None."""
    status = BatchStatus(row.status)
    if status is BatchStatus.CANCELLING:
        return BatchStatus.CANCELLED
    if row.completed + row.failed >= row.total and status is BatchStatus.IN_PROGRESS:
        return BatchStatus.COMPLETED
    return BatchStatus.EXPIRED if row.expires_at <= time.time() else None


def _num_running(connection: Connection, batch_id: str) -> int:
    claimed = sa.select(sa.func.count()).where(lines.c.batch_id == batch_id, lines.c.state == "waiting")
    return int(connection.scalar(claimed.where(lines.c.claimed_by.is_not(None))) or 0)


def _fail_waiting(connection: Connection, row: Row[Any], status: BatchStatus) -> bool:
    """Fails up to LINES_TOGETHER waiting lines of a batch that ends with this status. Returns True if more are left.

    The batch must end in the transaction that fails the last lines. Otherwise every line would have a result, and the
    batch would be completed.
    """
    code, message = ENDED[status]
    query = sa.select(lines.c.number, lines.c.custom_id)
    query = query.where(lines.c.batch_id == row.id, lines.c.state == "waiting").limit(LINES_TOGETHER + 1)
    waiting = connection.execute(query).all()
    failed = waiting[:LINES_TOGETHER]
    results = {each.number: _unanswered(row.id, each.number, each.custom_id, code, message) for each in failed}
    if results:
        of_line = lines.update().where(lines.c.batch_id == row.id, lines.c.number == sa.bindparam("line"))
        update = of_line.values(state="failed", body=b"", result=sa.bindparam("text"))
        connection.execute(update, [{"line": number, "text": text} for number, text in results.items()])
        num_bytes = sum(len(text) + 1 for text in results.values())
        counts: Any = {"failed": batches.c.failed + len(results), "result_bytes": batches.c.result_bytes + num_bytes}
        connection.execute(batches.update().where(batches.c.id == row.id).values(counts))
    return len(waiting) > len(failed)


def _add_file(connection: Connection, row: Row[Any], state: str, num_bytes: int, now: float, expires_at: float) -> str:
    """Adds the output or the error file of a batch, and returns its id."""
    file_id, is_error = new_id("file-"), state == "failed"
    connection.execute(
        files.insert().values(
            id=file_id,
            owner=row.owner,
            filename=f"{row.id}_{'error' if is_error else 'output'}.jsonl",
            purpose=OUTPUT,
            status="processed",
            bytes=num_bytes,
            created_at=now,
            expires_at=expires_at,
            batch_id=row.id,
            is_error=int(is_error),
        )
    )
    return file_id


def _is_validated_by(connection: Connection, batch_id: str, worker: str) -> Row[Any] | None:
    """Returns the row of a batch if it is being validated by this worker, and locks it."""
    query = sa.select(batches).where(batches.c.id == batch_id, batches.c.status == BatchStatus.VALIDATING)
    return connection.execute(query.where(batches.c.claimed_by == worker).with_for_update()).first()


def _delete_lines(connection: Connection, batch_id: str) -> None:
    connection.execute(lines.delete().where(lines.c.batch_id == batch_id))


def _release(connection: Connection, worker: str, batch_id: str | None = None) -> None:
    """Ends the claims of a worker."""
    for table, key in ((lines, lines.c.batch_id), (batches, batches.c.id)):
        claimed = table.update().where(table.c.claimed_by == worker)
        if batch_id is not None:
            claimed = claimed.where(key == batch_id)
        connection.execute(claimed.values(claimed_by=None))


def _now(connection: Connection) -> float:
    """Returns the time of the clock that all workers share: that of the database server, or of this machine."""
    if connection.dialect.name == "postgresql":
        return float(connection.scalar(sa.select(sa.extract("epoch", sa.func.clock_timestamp()))) or 0.0)
    return time.time()


def _update(connection: Connection, batch_id: str, **values: Any) -> None:
    connection.execute(batches.update().where(batches.c.id == batch_id).values(**values))


def _row(connection: Connection, owner: str, batch_id: str, *, lock: bool = False) -> Row[Any]:
    query = sa.select(batches).where(batches.c.id == batch_id, batches.c.owner == owner)
    row = connection.execute(query.with_for_update() if lock else query).first()
    if row is None:
        raise NotFound(NOT_FOUND)
    return row


def _seconds(at: float | None) -> int | None:
    return None if at is None else int(at)
