"""Tests of a response whose body is computed in threads."""

import asyncio
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message

from app.api.http.block_stream import BlockStream
from app.api.http.context import CLIENT_GONE, context_of
from app.batches.database import Database
from app.errors import InternalError, StorageUnavailable

END = {"type": "http.response.body", "body": b""}


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path)
    yield database
    database.close()


class Client:
    """Reads a response. It leaves when it has received `blocks_until_leaving` blocks."""

    def __init__(self, blocks_until_leaving: int | None = None) -> None:
        self.scope: dict[str, Any] = {"type": "http", "method": "GET", "headers": []}
        self.context = context_of(self.scope)
        self.messages = list[Message]()
        self._last, self._is_gone = blocks_until_leaving, asyncio.Event()

    async def read(self, response: BlockStream) -> None:
        await response(self.scope, self._receive, self._send)

    @property
    def blocks(self) -> list[bytes]:
        return [each["body"] for each in self.messages if each.get("more_body")]

    async def _receive(self) -> Message:
        await self._is_gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        self.messages.append(message)
        if len(self.blocks) == self._last:
            self._is_gone.set()
            await asyncio.Event().wait()  # The client accepts no more data.


class Blocks:
    """Generators of blocks that record what happens."""

    def __init__(self, *blocks: bytes | Exception) -> None:
        self._blocks = blocks
        self.threads, self.is_closed = set[threading.Thread](), False

    def __iter__(self) -> Generator[bytes, None, None]:
        try:
            for block in self._blocks:
                self.threads.add(threading.current_thread())
                if isinstance(block, Exception):
                    raise block
                yield block
        finally:
            self.is_closed = True


def response_of(blocks: Blocks, database: Database) -> BlockStream:
    return BlockStream(iter(blocks), database, "application/zip", {"X-Name": "value"})  # type: ignore[arg-type]


def test_blocks_are_computed_in_other_threads_and_sent_in_order(database: Database) -> None:
    async def main() -> None:
        blocks, client = Blocks(b"a", b"b", b"c"), Client()
        await client.read(response_of(blocks, database))
        start, *_, end = client.messages
        assert (start["status"], client.blocks, end) == (200, [b"a", b"b", b"c"], END)
        assert dict(start["headers"]) == {
            b"x-name": b"value",
            b"cache-control": b"no-store",
            b"content-type": b"application/zip",
        }
        assert blocks.is_closed
        assert threading.current_thread() not in blocks.threads
        assert client.context.outcome is None

    asyncio.run(main())


def test_head_computes_no_block(database: Database) -> None:
    async def main() -> None:
        blocks, client = Blocks(b"a"), Client()
        client.context.is_head = True
        await client.read(response_of(blocks, database))
        assert [each["type"] for each in client.messages] == ["http.response.start", "http.response.body"]
        assert (client.blocks, blocks.threads) == ([], set())

    asyncio.run(main())


def test_generator_is_closed_when_the_client_disconnects(database: Database) -> None:
    async def main() -> None:
        blocks, client = Blocks(b"a", b"b", b"c"), Client(blocks_until_leaving=2)
        await client.read(response_of(blocks, database))
        assert (client.blocks, client.context.outcome) == ([b"a", b"b"], CLIENT_GONE)
        assert blocks.is_closed
        assert END not in client.messages

    asyncio.run(main())


def test_generator_is_closed_after_the_block_that_is_computed_when_the_client_disconnects(database: Database) -> None:
    is_computing, may_go_on, is_closed = threading.Event(), threading.Event(), threading.Event()

    def blocks() -> Generator[bytes, None, None]:
        try:
            yield b"a"
            is_computing.set()
            may_go_on.wait()
            yield b"b"
            raise AssertionError("no block is needed")
        finally:
            is_closed.set()

    async def main() -> None:
        client, gone = Client(), asyncio.Event()

        async def receive() -> Message:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            client.messages.append(message)

        response = BlockStream(blocks(), database, "application/zip", {})
        answer = asyncio.ensure_future(response(client.scope, receive, send))
        await asyncio.to_thread(is_computing.wait)
        gone.set()
        asyncio.get_running_loop().call_soon(may_go_on.set)
        await answer
        assert is_closed.is_set()
        assert (client.blocks, client.context.outcome) == ([b"a"], CLIENT_GONE)

    asyncio.run(main())


def test_error_of_the_service_ends_the_response_without_its_end(database: Database) -> None:
    async def main() -> None:
        client = Client()
        await client.read(response_of(Blocks(b"a", StorageUnavailable(5)), database))
        assert (client.blocks, client.context.outcome) == ([b"a"], StorageUnavailable.code)
        assert END not in client.messages

    asyncio.run(main())


def test_unexpected_error_is_raised_and_ends_the_response_without_its_end(database: Database) -> None:
    async def main() -> None:
        client = Client()
        with pytest.raises(ZeroDivisionError):
            await client.read(response_of(Blocks(b"a", ZeroDivisionError()), database))
        assert (client.blocks, client.context.outcome) == ([b"a"], InternalError.code)
        assert END not in client.messages

    asyncio.run(main())
