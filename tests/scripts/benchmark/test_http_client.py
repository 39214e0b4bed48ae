"""Tests of the HTTP client with servers that send given bytes."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

from scripts.benchmark import http_client
from scripts.benchmark.http_client import HttpClient, Response, fetch

T = TypeVar("T")
PLAIN = b"HTTP/1.1 201 Created\r\nContent-Length: 4\r\nX-One: a: b\r\n\r\nfour"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\nA\r\n0123456789\r\n0\r\n\r\n"
LAST = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class Server:
    """Sends the same bytes after each request. If `closes` is set, it then closes the connection."""

    def __init__(self, answer: bytes, *, closes: bool = False) -> None:
        self.requests: list[bytes] = []
        self.connections: list[asyncio.Task[None] | None] = []
        self._answer, self._closes = answer, closes

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.append(asyncio.current_task())
        while request := await reader.read(10_000):
            self.requests.append(request)
            writer.write(self._answer)
            if self._closes:
                break
        writer.close()
        await writer.wait_closed()


def run(server: Server, use: Callable[[HttpClient], Awaitable[T]]) -> T:
    """Returns the result of a function that gets a client of the server."""

    async def main() -> T:
        async with await asyncio.start_server(server.serve, "127.0.0.1", 0) as listening:
            url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
            try:
                async with HttpClient(url) as client:
                    return await use(client)
            finally:  # the client has closed every connection, so that the server ends
                await asyncio.gather(*filter(None, server.connections))

    return asyncio.run(main())


def test_fetch_uses_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    server = Server(PLAIN, closes=True)
    url = "http://127.0.0.1:{}/a?b=1"
    assert run(server, lambda client: asyncio.to_thread(fetch, url.format(client._port), accept="image/png")) == b"four"
    assert server.requests[0].startswith(b"GET /a?b=1 ")
    assert b"Accept: image/png\r\n" in server.requests[0]


async def post_twice(client: HttpClient) -> list[Response]:
    found = [await client.request("POST", "/a?b=1", {"seed": 1}, "image/png")]
    await asyncio.sleep(0.05)
    return [*found, await client.request("GET", "/c")]


def test_requests_have_their_document_and_share_a_connection() -> None:
    server = Server(PLAIN)
    answers = run(server, post_twice)
    assert [(answer.status, answer.content) for answer in answers] == [(201, b"four")] * 2
    assert answers[0].headers == {"content-length": "4", "x-one": "a: b"}
    first, second = ([*head.split(b"\r\n")] for head in server.requests)
    assert (first[0], first[-1]) == (b"POST /a?b=1 HTTP/1.1", b'{"seed": 1}')
    assert {b"Accept: image/png", b"Content-Length: 11"} < set(first)
    assert (second[0], second[-1]) == (b"GET /c HTTP/1.1", b"")
    assert len(server.connections) == 1


@pytest.mark.parametrize("server", [Server(PLAIN, closes=True), Server(LAST)])
def test_closed_connection_is_not_used_again(server: Server) -> None:
    run(server, post_twice)
    assert (len(server.requests), len(server.connections)) == (2, 2)


def test_connection_that_was_free_for_long_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "KEPT_SECONDS", 0.01)
    server = Server(PLAIN)
    run(server, post_twice)
    assert len(server.connections) == 2


def test_requests_at_the_same_time_have_their_own_connections() -> None:
    server = Server(PLAIN)
    run(server, lambda client: asyncio.gather(*(client.request("GET", "/") for _ in range(3))))
    assert len(server.connections) == 3


def test_chunks_are_joined_or_taken_one_by_one() -> None:
    taken: list[bytes] = []

    async def use(client: HttpClient) -> list[bytes]:
        return [(await client.request("GET", "/", take=take)).content for take in (None, taken.append)]

    assert run(Server(CHUNKED), use) == [b"abc0123456789", b""]
    assert taken == [b"abc", b"0123456789"]


def test_answer_without_a_length_ends_with_its_connection() -> None:
    server = Server(b"HTTP/1.0 200 OK\r\n\r\nall", closes=True)
    assert [answer.content for answer in run(server, post_twice)] == [b"all"] * 2


@pytest.mark.parametrize("answer", [b"", PLAIN[:20], PLAIN[:-1], CHUNKED[:60], CHUNKED[:-2]])
def test_incomplete_answer_is_a_connection_error(answer: bytes) -> None:
    with pytest.raises(ConnectionError):
        run(Server(answer, closes=True), lambda client: client.request("GET", "/"))


def test_cancelled_request_closes_its_connection() -> None:
    async def use(client: HttpClient) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await client.request("GET", "/")

    run(Server(PLAIN[:-1]), use)
