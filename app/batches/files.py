"""Files: uploads in chunks, and the results of batches, whose content is read from the lines.

A file that has expired cannot be found, even before `clean_files` deletes it. An upload that is not finished is in no
list, and expires if no chunk arrives for UPLOAD_SECONDS.
"""

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from app.batches.database import Database
from app.batches.records import UPLOADED, File
from app.batches.tables import batches, chunks, files, lines
from app.errors import BodyTooLarge, Conflict, FieldError, NotFound, QuotaExceeded

CHUNK_BYTES = 1024 * 1024  # of a stored chunk, and about the size of a block of results
UPLOAD_SECONDS = 3600
FIRST_PAGE, LARGEST_PAGE = 16, 500  # lines that are read together
NOT_FOUND = "No file with this id exists. It may have been deleted or have expired"

_found = files.c.status == "processed"


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits for each owner, and the default lifetime of a file in seconds."""

    files: int
    file_bytes: int
    stored_bytes: int
    lines: int
    lifetime: int


class Files:
    """The files of all owners. Its methods block. They raise StorageUnavailable and StorageFull."""

    def __init__(self, database: Database, limits: Limits) -> None:
        self._database, self._limits = database, limits

    def begin(self, owner: str, filename: str) -> "Upload":
        """Begins an upload. Raises QuotaExceeded if the owner has too many files or bytes."""
        file_id, now, limits = new_id("file-"), time.time(), self._limits
        with self._database.write() as connection:
            lock_quota(connection, owner)
            uploads = sa.select(sa.func.count()).where(files.c.owner == owner, files.c.purpose == UPLOADED)
            if (connection.scalar(uploads.where(files.c.expires_at > now)) or 0) >= limits.files:
                raise QuotaExceeded(f"The limit of {limits.files} files is reached. Delete some of them first")
            check_stored(connection, owner, limits)
            values = {"id": file_id, "owner": owner, "filename": filename, "purpose": UPLOADED, "status": "uploading"}
            connection.execute(
                files.insert().values(**values, bytes=0, created_at=now, expires_at=now + UPLOAD_SECONDS)
            )
        return Upload(self._database, self._limits, file_id, owner)

    def get(self, owner: str, file_id: str) -> File:
        """Returns a file. Raises NotFound."""
        with self._database.read() as connection:
            return _file_of(_row(connection, owner, file_id))

    def list(
        self, owner: str, *, purpose: str | None = None, after: str | None = None, limit: int, newest_first: bool = True
    ) -> tuple[list[File], bool]:
        """Returns at most `limit` files that come after the file `after`, and True if there are more.

        Raises FieldError if no file has the id `after`.
        """
        query = sa.select(files).where(files.c.owner == owner, _found, _unexpired())
        if purpose:
            query = query.where(files.c.purpose == purpose)
        with self._database.read() as connection:
            try:
                last = _row(connection, owner, after) if after else None
            except NotFound:
                raise FieldError("after", NOT_FOUND) from None
            rows, has_more = page(connection, query, files, last, limit, newest_first=newest_first)
        return [_file_of(row) for row in rows], has_more

    def delete(self, owner: str, file_id: str) -> None:
        """Deletes a file and its content. Raises NotFound, and Conflict while a batch reads the file."""
        with self._database.write() as connection:
            row = _row(connection, owner, file_id, lock=True)
            reading = sa.select(batches.c.id).where(batches.c.input_file_id == file_id)
            batch_id = connection.scalar(reading.where(batches.c.status == "validating").limit(1))
            if batch_id:
                raise Conflict(f"{batch_id} is reading this file. Retry when its status is in_progress")
            delete_content(connection, row)

    def content(self, owner: str, file_id: str) -> Iterator[bytes]:
        """Yields the content in blocks of about CHUNK_BYTES. Raises NotFound.

        Each block has its own transaction. If the file is deleted meanwhile, the content ends early.
        """
        with self._database.read() as connection:
            row = _row(connection, owner, file_id)
        if row.batch_id:
            state = "failed" if row.is_error else "completed"
            for _, results in result_pages(self._database, row.batch_id, state):
                yield b"".join(result + b"\n" for result in results)
        else:
            yield from uploaded_blocks(self._database, file_id)


class Upload:
    """A file that is being uploaded."""

    def __init__(self, database: Database, limits: Limits, file_id: str, owner: str) -> None:
        self._database, self._limits, self._id, self._owner = database, limits, file_id, owner
        self._num_chunks = self._size = 0

    def add(self, chunk: bytes) -> None:
        """Stores the next part of the content. Raises BodyTooLarge, QuotaExceeded, or NotFound after a long pause."""
        self._size += len(chunk)
        if self._size > self._limits.file_bytes:
            raise BodyTooLarge(self._limits.file_bytes)
        with self._database.write() as connection:
            lock_quota(connection, self._owner)
            check_stored(connection, self._owner, self._limits, more=len(chunk))
            connection.execute(chunks.insert().values(file_id=self._id, number=self._num_chunks, data=chunk))
            if not self._update(connection, bytes=self._size, expires_at=time.time() + UPLOAD_SECONDS):
                raise NotFound(NOT_FOUND)  # The upload took too long and was deleted.
        self._num_chunks += 1

    def finish(self, lifetime: int | None = None) -> File:
        """Ends the upload. The file can be found from now on. `lifetime` is in seconds. None: the default."""
        now = time.time()
        expires_at = now + (lifetime or self._limits.lifetime)
        with self._database.write() as connection:
            self._update(connection, status="processed", created_at=now, expires_at=expires_at)
            return _file_of(_row(connection, self._owner, self._id))

    def abandon(self) -> None:
        """Deletes what was uploaded."""
        with self._database.write() as connection:
            delete_chunks(connection, self._id)

    def _update(self, connection: Connection, **values: Any) -> bool:
        """Changes the row of the file. Returns False if it does not exist any more."""
        return connection.execute(files.update().where(files.c.id == self._id).values(**values)).rowcount > 0


def new_id(prefix: str) -> str:
    """Returns the prefix with 24 random hexadecimal digits."""
    return prefix + secrets.token_hex(12)


def page(
    connection: Connection,
    query: sa.Select[Any],
    table: sa.Table,
    last: Row[Any] | None,
    limit: int,
    *,
    newest_first: bool,
) -> tuple[Sequence[Row[Any]], bool]:
    """Returns at most `limit` rows of a query that come after the row `last`, and True if there are more."""
    columns = (table.c.created_at, table.c.id)
    if last is not None:
        order = sa.tuple_(*columns)
        place = sa.tuple_(sa.literal(last.created_at, sa.Double), sa.literal(last.id))
        query = query.where(order < place if newest_first else order > place)
    query = query.order_by(*(column.desc() if newest_first else column for column in columns))
    rows = connection.execute(query.limit(limit + 1)).all()
    return rows[:limit], len(rows) > limit


def lock_quota(connection: Connection, owner: str) -> None:
    """Makes other transactions that check the quotas of the owner wait for the end of this one.

    SQLite has only one transaction that writes at the same time, and needs no lock.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtextextended(owner, 0))))


def check_stored(connection: Connection, owner: str, limits: Limits, more: int = 0) -> None:
    """Raises QuotaExceeded if the files, lines and results of the owner, and `more` bytes, exceed the limit."""
    uploads = sa.select(sa.func.sum(files.c.bytes)).where(files.c.owner == owner, files.c.purpose == UPLOADED)
    of_batches = sa.func.sum(batches.c.result_bytes + batches.c.input_bytes)
    results = sa.select(of_batches).where(batches.c.owner == owner)
    stored = sum(int(connection.scalar(query) or 0) for query in (uploads, results))
    if stored + max(more, 1) > limits.stored_bytes:
        raise QuotaExceeded(
            f"{stored} bytes are stored, and more would exceed the limit of {limits.stored_bytes}. Delete files first"
        )


def uploaded_blocks(database: Database, file_id: str) -> Iterator[bytes]:
    """Yields the chunks of an uploaded file. Each of them is read in its own transaction."""
    number = 0
    while True:
        with database.read() as connection:
            query = sa.select(chunks.c.data).where(chunks.c.file_id == file_id, chunks.c.number == number)
            chunk = connection.scalar(query)
        if chunk is None:
            return
        yield bytes(chunk)
        number += 1


def result_pages(database: Database, batch_id: str, state: str) -> Iterator[tuple[list[Any], list[bytes]]]:
    """Yields the rows and the results of the lines in this state, in order, in pages of about CHUNK_BYTES."""
    last, size = 0, FIRST_PAGE
    while True:
        query = (
            sa.select(lines.c.number, lines.c.custom_id, lines.c.result)
            .where(lines.c.batch_id == batch_id, lines.c.state == state, lines.c.number > last)
            .where(lines.c.result.is_not(None))
            .order_by(lines.c.number)
            .limit(size)
        )
        with database.read() as connection:
            rows = connection.execute(query).all()
        if not rows:
            return
        results = [bytes(row.result) for row in rows]
        last = rows[-1].number
        size = min(max(1, CHUNK_BYTES * len(rows) // sum(map(len, results))), LARGEST_PAGE)
        yield list(rows), results


def delete_content(connection: Connection, row: Row[Any]) -> None:
    """Deletes a file: its chunks, or the results of its batch."""
    delete_chunks(connection, row.id)
    if not row.batch_id:
        return
    state = "failed" if row.is_error else "completed"
    of_file = (lines.c.batch_id == row.batch_id, lines.c.state == state)
    connection.execute(lines.update().where(*of_file).values(result=None))
    column = batches.c.error_file_id if row.is_error else batches.c.output_file_id
    kept = {batches.c.result_bytes: batches.c.result_bytes - row.bytes, column: None}
    connection.execute(batches.update().where(batches.c.id == row.batch_id).values(kept))


def delete_chunks(connection: Connection, file_id: str) -> None:
    """Deletes an uploaded file."""
    connection.execute(chunks.delete().where(chunks.c.file_id == file_id))
    connection.execute(files.delete().where(files.c.id == file_id))


def clean_files(database: Database) -> None:
    """Deletes the files that have expired, except the input of a batch that is being validated."""
    reading = sa.select(batches.c.input_file_id).where(batches.c.status == "validating")
    expired = sa.select(files).where(files.c.expires_at <= time.time(), files.c.id.not_in(reading)).limit(1)
    expired = expired.with_for_update(skip_locked=True)  # Another worker deletes these.
    while True:
        with database.write() as connection:
            row = connection.execute(expired).first()
            if row is None:
                return
            delete_content(connection, row)


def _unexpired() -> sa.ColumnElement[bool]:
    return sa.or_(files.c.expires_at.is_(None), files.c.expires_at > time.time())


def _row(connection: Connection, owner: str, file_id: str, *, lock: bool = False) -> Row[Any]:
    query = sa.select(files).where(files.c.id == file_id, files.c.owner == owner, _found, _unexpired())
    row = connection.execute(query.with_for_update() if lock else query).first()
    if row is None:
        raise NotFound(NOT_FOUND)
    return row


def _file_of(row: Row[Any]) -> File:
    expires_at = None if row.expires_at is None else int(row.expires_at)
    return File(row.id, row.owner, row.filename, row.purpose, row.bytes, int(row.created_at), expires_at)
