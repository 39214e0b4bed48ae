"""Tests of how senders of webhooks share the events in the database, and of a database that does not answer."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from app.batches import webhooks as module
from app.batches.database import Database
from app.batches.tables import webhooks
from app.batches.webhooks import CLAIM_SECONDS, MOST_TOGETHER, WebhookSender
from app.errors import StorageUnavailable
from tests.app.batches.receiver import (
    HOST,
    LOCAL,
    OK,
    SECRET,
    Request,
    Resolver,
    add,
    is_empty,
    receiving,
    rows_of,
    sending,
    targets,
    until,
)
from tests.app.batches.store import Store
from tests.app.fakes import WAIT_SECONDS


def test_at_most_eight_events_are_sent_at_the_same_time(database: Database) -> None:
    async def main() -> tuple[int, list[Request]]:
        running, claimed, full = 0, 0, asyncio.Event()

        async def answer(writer: asyncio.StreamWriter) -> None:
            nonlocal running, claimed
            running += 1
            if running == MOST_TOGETHER:
                claimed = sum(row.claimed_by is not None for row in await asyncio.to_thread(rows_of, database))
                full.set()
            await full.wait()
            writer.write(OK)

        async with receiving(answer) as receiver:
            add(database, receiver.url(), 20)
            async with sending(WebhookSender(database, targets(), SECRET)):
                await until(database, is_empty)
            return claimed, receiver.requests

    claimed, requests = asyncio.run(main())
    assert claimed == MOST_TOGETHER == 8
    assert sorted(request.event().data.id for request in requests) == sorted(f"batch_{i}" for i in range(20))


def test_claim_of_another_sender_is_respected_until_it_runs_out(database: Database) -> None:
    async def main() -> None:
        async with receiving() as receiver:
            now = time.time()
            (held,) = add(database, receiver.url(), claimed_by="other", claimed_until=now + 1000)
            (left,) = add(database, receiver.url(), claimed_by="other", claimed_until=now - 1)
            async with sending(WebhookSender(database, targets(), SECRET)) as sender:
                (row,) = await until(database, lambda rows: len(rows) == 1)
                assert (row.id, row.claimed_by) == (held, "other")
                with database.write() as connection:
                    connection.execute(webhooks.update().values(claimed_until=now))
                sender.wake()
                await until(database, is_empty)
            assert [request.headers["webhook-id"] for request in receiver.requests] == [left, held]

    asyncio.run(main())


def test_two_senders_send_no_event_twice(workers: Callable[[], Store]) -> None:
    databases = [workers().database for _ in range(2)]

    async def main() -> None:
        async with receiving() as receiver:
            ids = add(databases[0], receiver.url(), 40)
            async with AsyncExitStack() as stack:
                for database in databases:
                    await stack.enter_async_context(sending(WebhookSender(database, targets(), SECRET)))
                await until(databases[0], is_empty)
            assert sorted(request.headers["webhook-id"] for request in receiver.requests) == sorted(ids)

    asyncio.run(main())


def test_event_that_another_sender_is_claiming_is_left_to_it(workers: Callable[[], Store]) -> None:
    claiming, database = (workers().database for _ in range(2))
    sender = WebhookSender(database, targets(), SECRET)
    first, second = add(database, f"https://{HOST}/", 2)
    with ThreadPoolExecutor() as pool, claiming.write() as connection:
        connection.execute(sa.select(webhooks).where(webhooks.c.id == first).with_for_update())
        rows, _ = pool.submit(sender._take).result(WAIT_SECONDS)
    assert [row.id for row in rows] == [second]


def test_sender_looks_again_when_a_claim_runs_out(database: Database) -> None:
    async def main() -> None:
        async with receiving() as receiver:
            add(database, receiver.url(), claimed_by="other", claimed_until=time.time() + 0.2)
            async with sending(WebhookSender(database, targets(), SECRET)):
                await until(database, is_empty)

    asyncio.run(main())


def test_stopped_sender_leaves_its_event_to_another_one(database: Database) -> None:
    async def main() -> None:
        arrived = asyncio.Event()

        async def hang(writer: asyncio.StreamWriter) -> None:
            if len(receiver.requests) == 1:
                arrived.set()
                await asyncio.Event().wait()
            writer.write(OK)

        async with receiving(hang) as receiver:
            add(database, receiver.url())
            async with sending(WebhookSender(database, targets(), SECRET)):
                await arrived.wait()
            (row,) = rows_of(database)
            assert (row.attempts, row.claimed_by) == (0, database.worker)
            assert row.next_at < row.claimed_until <= time.time() + CLAIM_SECONDS
            with database.write() as connection:
                connection.execute(webhooks.update().values(claimed_until=0.0))
            async with sending(WebhookSender(database, targets(), SECRET)):
                await until(database, is_empty)

    asyncio.run(main())


def test_result_of_an_attempt_whose_claim_was_lost_changes_nothing(database: Database) -> None:
    async def main() -> None:
        async def take_over(writer: asyncio.StreamWriter) -> None:
            with database.write() as connection:
                connection.execute(webhooks.update().values(claimed_by="other", claimed_until=time.time() + 1000))
            writer.write(b"HTTP/1.1 500 Internal Server Error\r\n\r\n")

        async with receiving(take_over) as receiver:
            add(database, receiver.url())
            sender = WebhookSender(database, targets(), SECRET)
            stored, run = asyncio.Event(), database.run

            async def watched(work: Callable[..., Any], *arguments: Any) -> Any:
                result = await run(work, *arguments)
                if arguments:  # the rows and their results
                    stored.set()
                return result

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(database, "run", watched)
                async with sending(sender):
                    await stored.wait()
            (row,) = rows_of(database)
            assert (row.attempts, row.claimed_by) == (0, "other")

    asyncio.run(main())


def test_sender_continues_when_the_database_answers_again(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.0)

    async def main() -> None:
        failures, run = 0, database.run

        async def unreliable(work: Callable[..., Any], *arguments: Any) -> Any:
            nonlocal failures
            if failures < 3:
                failures += 1
                raise StorageUnavailable(5)
            return await run(work, *arguments)

        monkeypatch.setattr(database, "run", unreliable)
        async with receiving() as receiver:
            add(database, receiver.url())
            async with sending(WebhookSender(database, targets(), SECRET)):
                await until(database, is_empty)
            assert (failures, len(receiver.requests)) == (3, 1)

    asyncio.run(main())
    assert [record.getMessage() for record in caplog.records] == ["Webhooks wait for the database"]


def test_sender_creates_no_database(tmp_path: Path) -> None:
    async def main() -> None:
        database = Database(tmp_path / "data")
        looked = asyncio.Event()

        class Watched(WebhookSender):
            async def _send_due(self, client: Any) -> None:
                looked.set()
                await super()._send_due(client)

        async with sending(Watched(database, targets(), SECRET)):
            await looked.wait()
        assert not (tmp_path / "data").exists()
        database.close()

    asyncio.run(main())


def test_sender_without_a_secret_sends_nothing(database: Database) -> None:
    add(database, f"https://{HOST}/")
    resolver = Resolver([LOCAL])
    asyncio.run(WebhookSender(database, targets(resolver), None).run())
    assert (len(rows_of(database)), resolver.calls) == (1, [])
