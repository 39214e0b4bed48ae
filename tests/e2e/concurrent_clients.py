"""Many concurrent clients in one event loop: some wait for their responses, others disconnect."""

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

from tests.e2e.process import TIMEOUT
from tests.e2e.service import Service

CLIENT_TIMEOUT = aiohttp.ClientTimeout(10 * TIMEOUT)


@dataclass
class Results:
    """What the clients received."""

    statuses: list[int] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    retry_after: list[int] = field(default_factory=list)
    health_seconds: list[float] = field(default_factory=list)
    lost: int = 0  # requests without a response

    def count(self, status: int) -> int:
        """Returns how many responses have this status."""
        return self.statuses.count(status)


def send_all(service: Service, bodies: Sequence[dict[str, Any] | bytes]) -> Results:
    """Sends all requests at the same time, each on its own connection, and polls /health meanwhile."""
    return asyncio.run(_send_all(service, bodies))


async def _send_all(service: Service, bodies: Sequence[dict[str, Any] | bytes]) -> Results:
    results = Results()
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(service.url, connector=connector, timeout=CLIENT_TIMEOUT) as session:
        polling = asyncio.create_task(_poll_health(session, results))
        await asyncio.gather(*(_send(session, body, results) for body in bodies))
        polling.cancel()
        with suppress(asyncio.CancelledError):
            await polling
    return results


async def _send(session: aiohttp.ClientSession, body: dict[str, Any] | bytes, results: Results) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        async with session.post("/generate", data=content, headers={"content-type": "application/json"}) as response:
            received = await response.json(content_type=None)
    except aiohttp.ClientError:
        results.lost += 1
        return
    results.statuses.append(response.status)
    results.bodies.append(received)
    if "Retry-After" in response.headers:
        results.retry_after.append(int(response.headers["Retry-After"]))


async def _poll_health(session: aiohttp.ClientSession, results: Results) -> None:
    with suppress(aiohttp.ClientError):  # the service has exited
        while True:
            start = time.monotonic()
            async with session.get("/health") as response:
                await response.read()
            results.health_seconds.append(time.monotonic() - start)
            await asyncio.sleep(0.05)


def send_and_disconnect(service: Service, body: dict[str, Any], count: int, seed: int) -> None:
    """Runs `count` concurrent clients that send all or part of the request and disconnect after a random time."""
    asyncio.run(_send_and_disconnect(service, json.dumps(body).encode(), count, random.Random(seed)))


async def _send_and_disconnect(service: Service, body: bytes, count: int, choose: random.Random) -> None:
    accept = ("application/json", "text/event-stream")
    heads = [
        f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAccept: {media_type}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        for media_type in accept
    ]
    await asyncio.gather(
        *(
            _disconnect(
                service.address, choose.choice(heads) + body, choose.random(), choose.uniform(0, 0.5), choose.random()
            )
            for _ in range(count)
        )
    )


async def _disconnect(address: tuple[str, int], request: bytes, share: float, seconds: float, how: float) -> None:
    """Sends the request (all of it if `share` is above 0.5), reads for `seconds`, then disconnects.

    `how` below 0.3 resets the connection, below 0.6 half-closes it before closing, otherwise closes it.
    """
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
