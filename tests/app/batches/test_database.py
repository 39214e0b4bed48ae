import asyncio
import contextlib
import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError

from app.batches import database as database_module
from app.batches.database import FILE, STREAM_THREADS, THREADS, Database, DatabaseError
from app.batches.tables import chunks, files
from app.errors import StorageFull, StorageUnavailable
from tests.app.batches.store import OWNER, Store
from tests.postgresql import PostgreSQL

TIMEOUT = 60  # seconds for another thread or process before the test fails
OTHER_PROCESS = """
import pathlib, sys
from app.batches.database import Database
from app.errors import StorageUnavailable
try:
    with Database(pathlib.Path(sys.argv[1])).write():
        print("opened")
except StorageUnavailable:
    print("refused")
"""


def open_in_another_process(folder: Path) -> str:
    """Returns what another process reports that opens the database of this folder."""
    done = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, folder], capture_output=True, text=True, timeout=TIMEOUT, check=True
    )
    return done.stdout.strip()


# SQLite in a folder


def test_second_process_is_refused_while_the_first_one_works(tmp_path: Path) -> None:
    with closing(Database(tmp_path)) as database:
        store = Store(database)
        file = store.upload(b"content")
        assert open_in_another_process(tmp_path) == "refused"
        assert store.read(file.id) == b"content"
        store.upload(b"more")
    assert open_in_another_process(tmp_path) == "opened"


def test_second_database_on_one_folder_is_refused_and_works_later(tmp_path: Path) -> None:
    with closing(Database(tmp_path)) as second:
        with closing(Database(tmp_path)) as first:
            first.open()
            with pytest.raises(StorageUnavailable), second.read():
                pass
        with second.read():
            pass


def test_folder_is_created_for_its_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with closing(Database(folder)) as database:
        before = database.exists
        assert not folder.exists()  # Only the first use creates it.
        database.open()
        assert (before, database.exists) == (False, True)
        assert folder.stat().st_mode & 0o777 == 0o700


def test_folder_that_cannot_be_used_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        closing(Database(tmp_path / "file" / "folder")) as database,
        pytest.raises(StorageUnavailable),
        database.read(),
    ):
        pass


def test_content_is_there_after_a_restart(tmp_path: Path) -> None:
    with closing(Database(tmp_path)) as database:
        file = Store(database).upload(b"content")
    with closing(Database(tmp_path)) as database:
        assert Store(database).read(file.id) == b"content"


def test_file_that_is_no_database_is_unavailable_and_lets_the_folder_go(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"no database" * 1000)
    with closing(Database(tmp_path)) as database:
        with pytest.raises(StorageUnavailable), database.read():
            pass
        (tmp_path / FILE).unlink()
        with database.read():
            pass


def test_full_disk_stores_nothing_of_a_transaction_and_works_after_a_deletion(tmp_path: Path) -> None:
    with closing(Database(tmp_path)) as database:
        event.listen(database.open(), "connect", limit_pages)
        database.open().dispose()  # so that all connections have the limit
        store = Store(database)
        file = store.upload(b"x" * 300_000)
        upload = store.files.begin(OWNER, "file")
        upload.add(b"x" * 100_000)
        with pytest.raises(StorageFull):
            upload.add(b"x" * 900_000)
        assert [len(row.data) for row in store.rows(chunks)] == [300_000, 100_000]
        assert sorted(row.bytes for row in store.rows(files)) == [100_000, 300_000]
        with pytest.raises(StorageFull):
            store.start(b"x" * 700_000)
        upload.abandon()
        store.files.delete(OWNER, file.id)
        assert store.finish(store.start(3)).completed == 3


def limit_pages(connection: Any, _: Any) -> None:
    connection.execute("PRAGMA max_page_count = 200")  # of 4096 bytes


def test_readers_do_not_wait_for_a_writer(tmp_path: Path) -> None:
    with closing(Database(tmp_path)) as database:
        store = Store(database)
        store.upload(b"one")
        with database.write() as connection:
            connection.execute(files.delete())
            assert len(store.rows(files)) == 1  # The other connection sees the state before.
        assert store.rows(files) == []


# PostgreSQL


@pytest.fixture
def remote(postgresql: PostgreSQL, tmp_path: Path) -> Iterator[Database]:
    with closing(Database(tmp_path, postgresql.new_schema())) as database:
        yield database


@contextlib.contextmanager
def stopped(server: PostgreSQL) -> Iterator[None]:
    """Stops the server for the duration of the context."""
    server.stop()
    try:
        yield
    finally:
        server.start()


def test_stopped_server_is_unavailable_and_is_used_again_after_its_start(
    postgresql: PostgreSQL, remote: Database
) -> None:
    store = Store(remote)
    file = store.upload(b"content")
    with stopped(postgresql):
        for _ in range(3):
            with pytest.raises(StorageUnavailable):
                store.files.get(OWNER, file.id)
            with pytest.raises(StorageUnavailable):
                store.upload(b"more")
    assert store.read(file.id) == b"content"
    store.upload(b"more")


def test_server_that_is_stopped_at_the_start_is_used_later(
    postgresql: PostgreSQL, remote: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stopped(postgresql), pytest.raises(StorageUnavailable):
        remote.open()
    with pytest.raises(StorageUnavailable):  # It does not try again before RETRY_SECONDS.
        remote.open()
    monkeypatch.setattr(database_module, "RETRY_SECONDS", 0)
    assert Store(remote).rows(files) == []


def test_transaction_that_breaks_stores_nothing(postgresql: PostgreSQL, remote: Database) -> None:
    store = Store(remote)
    file = store.upload(b"content")
    with pytest.raises(StorageUnavailable), remote.write() as connection:
        connection.execute(files.delete())
        with stopped(postgresql):
            connection.execute(chunks.delete())
    assert store.read(file.id) == b"content"


def test_full_disk_of_a_server_is_storage_full(remote: Database) -> None:
    class DiskFull(Exception):
        sqlstate = "53100"

    with pytest.raises(StorageFull), remote.write():
        raise DBAPIError("INSERT", {}, DiskFull("could not extend file"))


def test_missing_driver_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(database_module, "find_spec", lambda name: None)
    with pytest.raises(DatabaseError, match=r"pip install -e '\.\[postgres\]'"):
        Database(tmp_path, "postgresql://localhost/unfog")
    Database(tmp_path).close()  # SQLite needs no driver.


def test_log_does_not_have_the_password(
    postgresql: PostgreSQL, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = "postgresql://postgres:hidden@/missing?" + postgresql.new_schema().partition("?")[2]
    with closing(Database(tmp_path, url)) as database, pytest.raises(StorageUnavailable):
        database.open()
    assert caplog.records
    assert "hidden" not in str([vars(record) for record in caplog.records])


# Both


def test_exception_in_a_transaction_rolls_it_back(database: Database) -> None:
    store = Store(database)
    store.upload(b"content")
    with pytest.raises(ZeroDivisionError), database.write() as connection:
        connection.execute(files.delete())
        raise ZeroDivisionError
    assert len(store.rows(files)) == 1


def test_wrong_statement_is_unavailable_and_the_database_goes_on(database: Database) -> None:
    with pytest.raises(StorageUnavailable), database.read() as connection:
        connection.execute(sa.text("SELECT * FROM missing"))
    Store(database).upload(b"content")


def test_many_threads_write_one_after_the_other(database: Database) -> None:
    store = Store(database)

    async def main() -> None:
        await asyncio.gather(*(database.run(store.upload, b"content") for _ in range(30)))

    asyncio.run(main())
    assert len(store.rows(chunks)) == 30


def test_run_returns_the_result_or_raises_the_exception(database: Database) -> None:
    assert asyncio.run(database.run(divmod, 7, 2)) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(database.run(divmod, 1, 0))


@pytest.mark.parametrize("fails", [False, True])
def test_cancelled_run_waits_for_its_function(database: Database, fails: bool) -> None:
    started, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        assert may_end.wait(TIMEOUT)
        ended.set()
        assert not fails

    async def main() -> None:
        unexpected = list[Any]()
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unexpected.append(context))
        task = asyncio.create_task(database.run(work))
        await asyncio.to_thread(started.wait, TIMEOUT)
        for _ in range(3):  # A scope of anyio cancels again and again.
            task.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert not task.done()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()
        del task
        gc.collect()
        assert unexpected == []

    asyncio.run(main())


def test_values_of_an_iterator_are_read_while_all_other_threads_are_busy(database: Database) -> None:
    """Large downloads and other work do not delay each other."""
    release = threading.Event()

    async def main() -> list[int | None]:
        busy = [asyncio.create_task(database.run(release.wait)) for _ in range(2 * THREADS)]
        values = iter([1, 2])
        try:
            return [await database.next_of(values) for _ in range(3)]
        finally:
            release.set()
            await asyncio.gather(*busy)

    assert asyncio.run(main()) == [1, 2, None]


def test_work_is_done_while_the_threads_for_downloads_are_busy(database: Database) -> None:
    release = threading.Event()

    def values() -> Iterator[int]:
        release.wait()
        yield 1

    async def main() -> int:
        busy = [asyncio.create_task(database.next_of(values())) for _ in range(2 * STREAM_THREADS)]
        try:
            return await database.run(lambda: 2)
        finally:
            release.set()
            await asyncio.gather(*busy)

    assert asyncio.run(main()) == 2


def test_exception_of_an_iterator_is_raised(database: Database) -> None:
    def values() -> Iterator[int]:
        yield 1
        raise ZeroDivisionError

    async def main() -> None:
        iterator = values()
        assert await database.next_of(iterator) == 1
        await database.next_of(iterator)

    with pytest.raises(ZeroDivisionError):
        asyncio.run(main())


@pytest.mark.parametrize("url", ["postgresql://u:secret@host:notaport/db", "postgresql://[u:secret", "postgresql//x"])
def test_invalid_url_is_refused_at_the_start_without_showing_it(tmp_path: Path, url: str) -> None:
    with pytest.raises(DatabaseError, match="UNFOG_DATABASE_URL is invalid") as raised:
        Database(tmp_path, url)
    assert "secret" not in str(raised.value)
    assert raised.value.__suppress_context__


def test_closed_database_waits_for_its_work(database: Database) -> None:
    store = Store(database)

    async def main() -> None:
        work = asyncio.ensure_future(database.run(store.upload, b"content"))
        await asyncio.sleep(0)
        await asyncio.to_thread(database.close)
        await work

    asyncio.run(main())
    assert len(store.rows(files)) == 1  # The database opens again.
