"""HTTP clients for the measurements, with the standard library only."""

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import Any, Self

ROUTE = "/generate"
CLOSE_SECONDS = 60.0  # time limit for the last answers

Body = dict[str, Any]


class RequestFailed(Exception):
    """A request was not answered with status 200. The message is one line."""


class Connection:
    """A connection that is kept open for further requests."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._writer.close()
        with suppress(OSError):  # The service has closed the connection.
            await self._writer.wait_closed()

    async def post(self, body: Body) -> bytes:
        """Sends a request and returns the body of the answer. Raises RequestFailed if the status is not 200."""
        content = json.dumps(body).encode()
        head = f"POST {ROUTE} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        self._writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        await self._writer.drain()
        status, *lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        answer = await self._reader.readexactly(int(headers["content-length"]))
        if status.split()[1] != "200":
            raise RequestFailed(f"{ROUTE} answered {status.split()[1]}: {answer[:200].decode(errors='replace')}")
        return answer


async def latencies(port: int, bodies: list[Body]) -> list[float]:
    """Sends the requests one after the other. Returns the seconds from each request to its whole answer."""
    seconds = []
    async with Connection(port) as connection:
        for body in bodies:
            start = time.perf_counter()
            await connection.post(body)
            seconds.append(time.perf_counter() - start)
    return seconds


async def closed_loop(port: int, clients: int, make: Callable[[int], Body], settle: float, seconds: float) -> float:
    """Runs clients that send their next request after each answer. Returns the answers per second of all clients.

    The rate of a client is measured from its first answer after `settle` seconds to its first answer after further
    `seconds`. So a request that takes longer than `seconds` also has a rate. Raises RequestFailed if a request fails.
    """
    numbers, rates = count(), list[float]()
    first = time.perf_counter() + settle

    async def run() -> None:
        # `start` is the time of the first answer after `first`. `num_answers` is the number of answers after `start`.
        num_answers, start, now = 0, 0.0, first
        async with Connection(port) as connection:
            while not num_answers or now < first + seconds:
                await connection.post(make(next(numbers)))
                now = time.perf_counter()
                num_answers += start > 0
                start = start or (now if now >= first else 0.0)
        rates.append(num_answers / (now - start))

    try:
        async with asyncio.timeout(settle + seconds + CLOSE_SECONDS), asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(run())
    except BaseExceptionGroup as errors:  # The errors of the other clients have the same cause.
        raise errors.exceptions[0] from None
    return sum(rates)
