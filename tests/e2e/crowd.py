"""Many clients at once, from one event loop."""

import asyncio
import json
import random
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.e2e.process import PATIENCE
from tests.e2e.service import Service

UNLIMITED = aiohttp.ClientTimeout(10 * PATIENCE)


@dataclass
class Crowd:
    """What came of it."""

    statuses: list[int] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    retry_after: list[int] = field(default_factory=list)
    health_seconds: list[float] = field(default_factory=list)
    lost: int = 0  # requests without an answer

    def count(self, status: int) -> int:
        """Answers of that status."""
        return self.statuses.count(status)


def rush(service: Service, bodies: Sequence[dict[str, Any] | bytes]) -> Crowd:
    """All at once, each on a connection of its own, while /health is asked again and again."""
    return asyncio.run(_rush(service, bodies))


async def _rush(service: Service, bodies: Sequence[dict[str, Any] | bytes]) -> Crowd:
    crowd = Crowd()
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(service.url, connector=connector, timeout=UNLIMITED) as session:
        watching = asyncio.create_task(_watch(session, crowd))
        await asyncio.gather(*(_ask(session, body, crowd) for body in bodies))
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
    return crowd


async def _ask(session: aiohttp.ClientSession, body: dict[str, Any] | bytes, crowd: Crowd) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        async with session.post("/generate", data=content, headers={"content-type": "application/json"}) as answer:
            content = await answer.json(content_type=None)
    except aiohttp.ClientError:
        crowd.lost += 1
        return
    crowd.statuses.append(answer.status)
    crowd.answers.append(content)
    if "Retry-After" in answer.headers:
        crowd.retry_after.append(int(answer.headers["Retry-After"]))


async def _watch(session: aiohttp.ClientSession, crowd: Crowd) -> None:
    with suppress(aiohttp.ClientError):  # the service has ended
        while True:
            start = time.monotonic()
            async with session.get("/health") as answer:
                await answer.read()
            crowd.health_seconds.append(time.monotonic() - start)
            await asyncio.sleep(0.05)


def vanish(service: Service, body: dict[str, Any], count: int, seed: int) -> None:
    """So many clients that send a request, or a part of it, and are gone at a moment that nobody chose."""
    asyncio.run(_vanish(service, json.dumps(body).encode(), count, random.Random(seed)))


async def _vanish(service: Service, body: bytes, count: int, choose: random.Random) -> None:
    accept = ("application/json", "text/event-stream")
    heads = [
        f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAccept: {media_type}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        for media_type in accept
    ]
    await asyncio.gather(
        *(
            _leave(
                service.address, choose.choice(heads) + body, choose.random(), choose.uniform(0, 0.5), choose.random()
            )
            for _ in range(count)
        )
    )


async def _leave(address: tuple[str, int], request: bytes, share: float, seconds: float, how: float) -> None:
    """Half of them send all of it; they close, close one side, or reset."""
    reader, writer = await asyncio.open_connection(*address)
    writer.write(request if share > 0.5 else request[: int(2 * share * len(request))])
    with suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(seconds):
            await reader.read()
    with suppress(OSError):
        if how < 0.3:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        elif how < 0.6:
            writer.write_eof()
    writer.close()
