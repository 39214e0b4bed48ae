"""The database of files and batches: SQLite in a folder, or PostgreSQL.

SQLite has a write-ahead log (WAL), so that readers and the writer do not wait for each other. Each commit is on the
disk when it returns (`synchronous=FULL`). A lock on the folder keeps out a second process, which would otherwise take
over the lines of the first one, as if it were dead. With PostgreSQL, several processes share the work.

All functions of this package that use a connection block their thread. The event loop calls them with `Database.run`.
"""

import asyncio
import contextlib
import fcntl
import logging
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError

from app.batches.tables import metadata
from app.errors import StorageFull, StorageUnavailable

log = logging.getLogger(__name__)

FILE = "batches.db"
THREADS, STREAM_THREADS = 4, 2  # of `run` and of downloads; each uses at most one connection
RETRY_SECONDS = 5  # Retry-After while the database does not answer
LOCK_SECONDS, STATEMENT_SECONDS = 20, 120  # limits of a wait for a lock, and of a statement, of PostgreSQL
IDLE_SECONDS = 10  # after which PostgreSQL ends a transaction whose process does nothing
CONNECT_SECONDS = 5
# For PostgreSQL. A server that disappears without closing the connection would otherwise block a thread for minutes.
CONNECTION = {
    "connect_timeout": CONNECT_SECONDS,
    "keepalives_idle": 10,  # seconds
    "keepalives_interval": 5,
    "keepalives_count": 2,
    "tcp_user_timeout": 20_000,  # milliseconds
}
BUSY_SECONDS = 30  # how long a writer of SQLite waits for another one
# What identifies a full disk: the message of SQLite, and the SQLSTATE of PostgreSQL (disk_full).
FULL, FULL_STATE = "database or disk is full", "53100"
SCHEMA_LOCK = 7_238_461  # of PostgreSQL, so that two processes do not create the tables at the same time

INVALID_URL = "UNFOG_DATABASE_URL is invalid. Use the form postgresql://USER:PASSWORD@HOST:PORT/NAME"
MISSING_DRIVER = "UNFOG_DATABASE_URL needs the extra `postgres`. Install it with: pip install -e '.[postgres]'"

T = TypeVar("T")


class DatabaseError(Exception):
    """The settings of the database cannot be used. The message is one sentence for the operator."""


class Database:
    """The connections to the database. Any thread may use it."""

    def __init__(self, folder: Path, url: str | None = None) -> None:
        """`url` is that of a PostgreSQL database. Without it, the database is a SQLite file in `folder`.

        Raises DatabaseError if the URL is invalid, or if the driver of PostgreSQL is not installed.
        """
        if url and not find_spec("psycopg"):
            raise DatabaseError(MISSING_DRIVER)
        try:
            self._url = make_url(url).set(drivername="postgresql+psycopg") if url else None
        except (SQLAlchemyError, ValueError):  # Their messages can contain the password.
            raise DatabaseError(INVALID_URL) from None
        self.worker = secrets.token_hex(16)  # identifies this process in the tables
        self.is_shared = url is not None  # True if other processes can use the database
        self._folder, self._failed_at = folder, -math.inf
        self._reason: str | None = None  # why the folder could not be used
        self._engine: Engine | None = None
        self._lock_file: int | None = None
        self._open_lock = threading.Lock()
        self._write_lock = threading.Lock()  # SQLite has one writer; a thread that waits here needs no retries
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="database")
        # Large downloads have threads of their own, so that they do not delay the workers and the other requests.
        self._streams = ThreadPoolExecutor(STREAM_THREADS, thread_name_prefix="database-stream")
        self._heart = ThreadPoolExecutor(1, thread_name_prefix="database-beat")

    @property
    def exists(self) -> bool:
        """Returns True if an earlier process may have left batches."""
        return self.is_shared or os.access(self._folder / FILE, os.F_OK)  # Path.exists() raises PermissionError

    def open(self) -> Engine:
        """Returns the engine of SQLAlchemy. The first call connects and creates the tables.

        Raises StorageUnavailable if the database does not answer or its folder cannot be used. With PostgreSQL,
        it does so at once for RETRY_SECONDS after a failure, because each attempt can take CONNECT_SECONDS.
        """
        with self._open_lock:
            if self._engine is None:
                if self.is_shared and time.monotonic() - self._failed_at < RETRY_SECONDS:
                    raise StorageUnavailable(RETRY_SECONDS)
                self._failed_at = time.monotonic()
                engine = self._postgresql(self._url) if self._url else self._sqlite()
                try:
                    with _translated(), engine.begin() as connection:
                        if self._url:
                            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(SCHEMA_LOCK)))
                        metadata.create_all(connection)
                except BaseException:
                    engine.dispose()
                    self._unlock()
                    raise
                self._engine, self._failed_at = engine, -math.inf
            return self._engine

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Yields a connection whose transaction sees one state of the database."""
        with _translated(), self.open().connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Yields a connection with a transaction that is committed at the end, or rolled back after an exception."""
        engine = self.open()
        with (
            contextlib.nullcontext() if self.is_shared else self._write_lock,
            _translated(),
            engine.connect().execution_options(unfog_writes=True) as connection,
            connection.begin(),
        ):
            yield connection

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """Calls the function in a thread of the pool, and returns its result.

        If the task is cancelled, it first waits for the function, so that nothing changes the database afterwards.
        """
        return await self._run_in(self._pool, partial(work, *arguments))

    async def run_undelayed(self, work: Callable[..., T], *arguments: Any) -> T:
        """Is `run` in a thread that nothing else uses, so that no other work delays the function."""
        return await self._run_in(self._heart, partial(work, *arguments))

    async def next_of(self, values: Iterator[T]) -> T | None:
        """Returns the next value of an iterator that reads the database, or None at its end.

        It is computed in one of the threads for downloads, which `run` does not use.
        """
        return await self._run_in(self._streams, partial(next, values, None))

    async def _run_in(self, pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        future = asyncio.get_running_loop().run_in_executor(pool, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            while not future.done():
                with contextlib.suppress(asyncio.CancelledError):  # anyio cancels repeatedly
                    await asyncio.wait([future])
            raise

    def close(self) -> None:
        """Closes the connections. Waits for the work in all threads, because a connection in use would stay open."""
        for pool in (self._pool, self._streams, self._heart):
            pool.shutdown(cancel_futures=True)
        with self._open_lock:
            if self._engine:
                self._engine.dispose()
                self._engine = None
            self._unlock()

    def _postgresql(self, url: URL) -> Engine:
        engine = sa.create_engine(
            url,
            pool_size=THREADS + STREAM_THREADS + 1,
            max_overflow=THREADS,
            pool_pre_ping=True,
            connect_args=CONNECTION,
        )
        event.listen(engine, "connect", _configure_postgresql)
        return engine

    def _sqlite(self) -> Engine:
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock_file = os.open(self._folder, os.O_RDONLY)
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._unlock()
            reason = "another process uses it" if isinstance(error, BlockingIOError) else error.strerror
            if reason != self._reason:  # Log it once.
                log.error("UNFOG_DATA_DIR cannot be used", extra={"folder": str(self._folder), "reason": reason})
            self._reason = reason
            raise StorageUnavailable(RETRY_SECONDS) from error
        engine = sa.create_engine(
            f"sqlite+pysqlite:///{self._folder / FILE}",
            pool_size=THREADS + STREAM_THREADS + 1,
            max_overflow=THREADS,
            connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False},
        )
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine

    def _unlock(self) -> None:
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None


def _configure_postgresql(connection: Any, _: Any) -> None:
    """Configures a new connection. A process that is paused within a transaction would keep its locks for long."""
    connection.execute(f"SET idle_in_transaction_session_timeout = {1000 * IDLE_SECONDS}")
    connection.execute(f"SET lock_timeout = {1000 * LOCK_SECONDS}")
    connection.execute(f"SET statement_timeout = {1000 * STATEMENT_SECONDS}")
    connection.commit()


def _configure_sqlite(connection: Any, _: Any) -> None:
    """Configures a new connection. SQLAlchemy begins the transactions (see _begin_sqlite), and not the driver."""
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=OFF"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    """Begins a transaction. One that writes takes the lock at once: a later upgrade could fail."""
    writes = connection.get_execution_options().get("unfog_writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def _translated() -> Iterator[None]:
    """Raises StorageFull or StorageUnavailable instead of the errors of SQLAlchemy, except IntegrityError."""
    try:
        yield
    except IntegrityError:
        raise
    except DBAPIError as error:
        state = getattr(error.orig, "sqlstate", None)
        if state == FULL_STATE or FULL in str(error.orig):
            log.warning("The database is full", extra={"error": str(error.orig)})
            raise StorageFull from error
        log.warning("The database does not answer", extra={"error": str(error.orig)})
        raise StorageUnavailable(RETRY_SECONDS) from error
    except SQLAlchemyError as error:  # such as a timeout of the pool
        log.warning("The database does not answer", extra={"error": str(error)})
        raise StorageUnavailable(RETRY_SECONDS) from error
