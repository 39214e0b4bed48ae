"""Tests of the HTTP clients with a server that counts its requests."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

from scripts.gpu.clients import RequestFailed, closed_loop, latencies

T = TypeVar("T")


class Server:
    """Answers each request after a delay. From request number `first_error` on, the status is 429."""

    def __init__(self, seconds: float = 0.0, first_error: int = 1 << 30) -> None:
        self.bodies: list[object] = []
        self.num_connections = 0
        self.open = set[asyncio.Task[None] | None]()
        self._seconds, self._first_error = seconds, first_error

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self.open.add(asyncio.current_task())
        while not reader.at_eof():
            try:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
            except asyncio.IncompleteReadError:
                break
            size = int(head.lower().split("content-length: ")[1].split("\r\n")[0])
            self.bodies.append(json.loads(await reader.readexactly(size)))
            await asyncio.sleep(self._seconds)
            status = "200 OK" if len(self.bodies) < self._first_error else "429 Too Many Requests"
            writer.write(f"HTTP/1.1 {status}\r\nContent-Length: 4\r\n\r\nbusy".encode())
            await writer.drain()
        writer.close()
        await writer.wait_closed()


def run(server: Server, use: Callable[[int], Awaitable[T]]) -> T:
    """Returns the result of a function that gets the port of the server."""

    async def main() -> T:
        async with await asyncio.start_server(server.serve, "127.0.0.1", 0) as listening:
            try:
                return await use(listening.sockets[0].getsockname()[1])
            finally:
                await asyncio.gather(*filter(None, server.open))

    return asyncio.run(main())


def test_latencies_are_those_of_requests_on_one_connection() -> None:
    server = Server(seconds=0.02)
    seconds = run(server, lambda port: latencies(port, [{"seed": 1}, {"seed": 2}]))
    assert len(seconds) == 2 and min(seconds) >= 0.02
    assert (server.bodies, server.num_connections) == ([{"seed": 1}, {"seed": 2}], 1)


def test_closed_loop_returns_the_sum_of_the_rates_of_its_clients() -> None:
    server = Server(seconds=0.01)
    rate = run(server, lambda port: closed_loop(port, 3, lambda number: {"seed": number}, 0.1, 0.3))
    assert server.num_connections == 3
    assert 0 < rate <= 3 / 0.01
    assert server.bodies == [{"seed": number} for number in range(len(server.bodies))]


def test_request_that_is_longer_than_the_measurement_has_a_rate() -> None:
    server = Server(seconds=0.1)
    rate = run(server, lambda port: closed_loop(port, 1, lambda number: {"seed": number}, 0.0, 0.01))
    assert len(server.bodies) == 2
    assert 0 < rate <= 1 / 0.1


def test_refused_request_ends_the_load_with_its_status() -> None:
    server = Server(first_error=5)
    with pytest.raises(RequestFailed, match="/generate answered 429: busy"):
        run(server, lambda port: closed_loop(port, 2, lambda number: {}, 0.0, 30.0))
