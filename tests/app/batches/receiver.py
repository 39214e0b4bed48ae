"""A server that receives webhooks, a resolver of hosts, and what the tests do with the events in the database."""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest
import sqlalchemy as sa

from app.batches.database import Database
from app.batches.tables import webhooks
from app.batches.webhooks import WebhookSender, WebhookTargets, event_row
from tests.app.fakes import WAIT_SECONDS

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
HOST = "hooks.example.com"
LOCAL = "127.0.0.1"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


@dataclass
class Request:
    """A request that the server has received."""

    line: str
    headers: Mapping[str, str]
    body: bytes

    def event(self) -> Any:
        """Returns the event. The client of OpenAI raises an error if the signature is wrong."""
        client = openai.OpenAI(api_key="unused", webhook_secret=SECRET)
        return client.webhooks.unwrap(self.body, self.headers)


@dataclass
class Receiver:
    """A server that answers every request by `answer`, and closes the connection."""

    answer: Answer
    port: int = 0
    requests: list[Request] = field(default_factory=list)
    tasks: set["asyncio.Task[None]"] = field(default_factory=set)  # of the connections

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.tasks.add(asyncio.create_task(self.handle(reader, writer)))

    def url(self, scheme: str = "http", path: str = "/hook", host: str = HOST) -> str:
        return f"{scheme}://{host}:{self.port}{path}"

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            line, *fields = (await reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
            headers = {name.lower(): value for name, _, value in (each.partition(": ") for each in fields)}
            body = await reader.readexactly(int(headers["content-length"]))
            self.requests.append(Request(line, headers, body))
            await self.answer(writer)
            writer.close()
            await writer.wait_closed()
        except (OSError, EOFError):
            pass  # The sender has closed the connection.
        finally:
            writer.transport.abort()

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


class Resolver:
    """Resolves every host to the addresses, the first of them at the first call and so on. The last one is kept."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self._answers, self.calls = list(answers), list[tuple[str, int]]()

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.calls.append((host, port))
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


def answer_with(*parts: bytes) -> Answer:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(b"".join(parts))
        await writer.drain()

    return answer


@asynccontextmanager
async def receiving(answer: Answer | None = None, tls: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    """Runs a server. Without `answer`, it answers with status 200."""
    receiver = Receiver(answer or answer_with(OK))
    server = await asyncio.start_server(receiver.accept, LOCAL, 0, ssl=tls)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        server.close()
        await receiver.stop()


@asynccontextmanager
async def sending(sender: WebhookSender) -> AsyncIterator[WebhookSender]:
    task = asyncio.create_task(sender.run())
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            yield sender
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


def targets(resolver: Resolver | None = None, permits_private: bool = True) -> WebhookTargets:
    return WebhookTargets([HOST], permits_private, resolve=resolver or Resolver([LOCAL]))


def add(database: Database, url: str, count: int = 1, kind: str = "batch.completed", **values: Any) -> list[str]:
    """Adds due events, and returns their ids."""
    rows = [event_row(f"batch_{i}", kind, url, time.time()) | values for i in range(count)]
    with database.write() as connection:
        connection.execute(webhooks.insert(), rows)
    return [row["id"] for row in rows]


def rows_of(database: Database) -> Sequence[sa.Row[Any]]:
    with database.read() as connection:
        return connection.execute(sa.select(webhooks).order_by(webhooks.c.batch_id)).all()


async def until(database: Database, condition: Callable[[Sequence[sa.Row[Any]]], bool]) -> Sequence[sa.Row[Any]]:
    """Returns the rows as soon as the condition is true for them."""
    while not condition(rows := await asyncio.to_thread(rows_of, database)):
        pass
    return rows


def has_attempts(count: int) -> Callable[[Sequence[sa.Row[Any]]], bool]:
    return lambda rows: bool(rows) and all(row.attempts == count for row in rows)


def is_empty(rows: Sequence[sa.Row[Any]]) -> bool:
    return not rows


def make_due(database: Database) -> None:
    with database.write() as connection:
        connection.execute(webhooks.update().values(next_at=0.0))
