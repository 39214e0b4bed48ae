import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from app.api.http.upload_memory import MIN_PROGRESS, STALL_SECONDS, UploadMemory
from app.errors import Overloaded, RequestTimeout

LIMIT = 20 * MIN_PROGRESS
SHARE = LIMIT // 2


class Sender:
    """Sends parts of a body when the test says so."""

    def __init__(self, memory: UploadMemory, client: str) -> None:
        self._memory, self._client = memory, client
        self._parts: asyncio.Queue[int] = asyncio.Queue()
        self.task = asyncio.ensure_future(self._receive())

    async def _receive(self) -> bytes:
        async def read(add: Callable[[int], None]) -> bytes:
            while size := await self._parts.get():
                add(size)
            return b"complete"

        with self._memory.hold(self._client) as upload:
            return await self._memory.receive(upload, read)

    async def send(self, size: int) -> None:
        """Sends a part and waits until it was counted. Size 0 completes the body."""
        self._parts.put_nowait(size)
        for _ in range(5):
            await asyncio.sleep(0)

    @property
    def error(self) -> type[BaseException] | None:
        """The error that ended the upload, or None while it arrives."""
        error = self.task.exception() if self.task.done() else None
        return type(error) if error else None


def run(scenario: Callable[[UploadMemory, Callable[[float], None]], Coroutine[Any, Any, None]]) -> None:
    """Runs a scenario with a memory of LIMIT bytes and a function that advances its clock."""
    now = [1000.0]

    def advance(seconds: float) -> None:
        now[0] += seconds

    async def main() -> None:
        memory = UploadMemory(LIMIT, lambda: now[0])
        await scenario(memory, advance)
        rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        assert memory.size == 0

    asyncio.run(main())


def test_body_keeps_its_memory_until_the_end_of_its_block() -> None:
    async def scenario(memory: UploadMemory, advance: Callable[[float], None]) -> None:
        with memory.hold("a") as upload:

            async def read(add: Callable[[int], None]) -> bytes:
                add(3)
                add(4)
                return b"1234567"

            assert await memory.receive(upload, read) == b"1234567"
            assert memory.size == 7
        assert memory.size == 0

    run(scenario)


def test_client_over_its_share_is_refused_and_others_are_not() -> None:
    async def scenario(memory: UploadMemory, advance: Callable[[float], None]) -> None:
        first, second, other = Sender(memory, "a"), Sender(memory, "a"), Sender(memory, "b")
        await first.send(SHARE)
        await second.send(1)
        await other.send(SHARE)
        assert (first.error, second.error, other.error) == (None, Overloaded, None)
        assert memory.size == LIMIT

    run(scenario)


def test_client_over_its_share_loses_its_own_stalled_body() -> None:
    async def scenario(memory: UploadMemory, advance: Callable[[float], None]) -> None:
        other, stalled, fresh = Sender(memory, "b"), Sender(memory, "a"), Sender(memory, "a")
        await other.send(1)
        await stalled.send(SHARE)
        advance(STALL_SECONDS)
        await fresh.send(SHARE)
        assert (other.error, stalled.error, fresh.error) == (None, RequestTimeout, None)

    run(scenario)


def test_body_that_is_stalled_for_the_longest_time_is_given_up_first() -> None:
    async def scenario(memory: UploadMemory, advance: Callable[[float], None]) -> None:
        senders = [Sender(memory, str(i)) for i in range(4)]
        for sender in senders:
            await sender.send(LIMIT // 4 - MIN_PROGRESS)
            advance(STALL_SECONDS)
        await senders[0].send(MIN_PROGRESS)  # now the second one is the first
        await Sender(memory, "new").send(4 * MIN_PROGRESS)
        assert [sender.error for sender in senders] == [None, RequestTimeout, None, None]

    run(scenario)


def test_single_bytes_do_not_keep_a_body_alive() -> None:
    async def scenario(memory: UploadMemory, advance: Callable[[float], None]) -> None:
        trickling, steady, new = Sender(memory, "a"), Sender(memory, "b"), Sender(memory, "c")
        await trickling.send(SHARE - 10)
        await steady.send(SHARE - 2 * MIN_PROGRESS)
        for _ in range(2):
            advance(STALL_SECONDS / 2)
            await trickling.send(1)
            await steady.send(MIN_PROGRESS)
        await new.send(20)
        assert (trickling.error, steady.error, new.error) == (RequestTimeout, None, None)

    run(scenario)


def test_complete_body_is_not_given_up() -> None:
    async def scenario(memory: UploadMemory, advance: Callable[[float], None]) -> None:
        async def read(add: Callable[[int], None]) -> bytes:
            add(SHARE)
            return b""

        with memory.hold("a") as complete:
            await memory.receive(complete, read)
            advance(10 * STALL_SECONDS)
            late = Sender(memory, "a")
            await late.send(1)
            assert late.error is Overloaded
            assert memory.size == SHARE

    run(scenario)


def test_part_that_arrives_after_its_body_was_given_up_is_refused() -> None:
    async def scenario(memory: UploadMemory, advance: Callable[[float], None]) -> None:
        stalled, fresh = Sender(memory, "a"), Sender(memory, "a")
        await stalled.send(SHARE)
        advance(STALL_SECONDS)
        fresh._parts.put_nowait(SHARE)
        stalled._parts.put_nowait(1)  # in the same iteration of the event loop
        await fresh.send(0)
        assert stalled.error is RequestTimeout
        assert fresh.task.result() == b"complete"

    run(scenario)
