"""HTTP clients of the standard library: `fetch` for single requests, and `HttpClient` for the load generators.

HttpClient does only what they need, because a load generator takes processor time from the service that it measures.
"""

import asyncio
import json
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

# How long a free connection can be used again: less than the service keeps it (5 s), which could otherwise close it
# while a request is sent.
KEPT_SECONDS = 2.0

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def fetch(url: str, document: Any = None, accept: str = "*/*", timeout: float = 10.0) -> bytes:
    """Returns the answer to a GET request, or to a POST request with a JSON document. Uses no proxy.

    Raises OSError, which is an HTTPError if the status is 400 or above, and HTTPException for a broken answer.
    """
    body = None if document is None else json.dumps(document).encode()
    headers = {"Accept": accept, "Content-Type": "application/json"}
    with _DIRECT.open(urllib.request.Request(url, body, headers), timeout=timeout) as answer:
        content: bytes = answer.read()
    return content


@dataclass(frozen=True, slots=True)
class Response:
    """An answer that was read to its end."""

    status: int
    headers: Mapping[str, str]  # names in lower case
    content: bytes


@dataclass(slots=True)
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    free_since: float = 0.0

    @property
    def is_usable(self) -> bool:
        return not self.reader.at_eof() and time.monotonic() < self.free_since + KEPT_SECONDS


class HttpClient:
    """Sends requests to one service. A request that finds no free connection opens one."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._host, self._port = address.hostname, address.port
        self._free: list[_Connection] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        for connection in self._free:
            connection.writer.close()
            with suppress(OSError):  # the service has closed it
                await connection.writer.wait_closed()

    async def request(
        self,
        method: str,
        path: str,
        document: Any = None,
        accept: str = "*/*",
        take: Callable[[bytes], object] | None = None,
    ) -> Response:
        """Sends a request with a JSON document, and reads the whole answer.

        If the answer has chunks, `take` gets each of them, and the response has none. Raises OSError if the connection
        breaks.
        """
        body = b"" if document is None else json.dumps(document).encode()
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nAccept: {accept}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection, is_free = await self._connection(), False
        try:
            connection.writer.write(head.encode() + body)
            await connection.writer.drain()
            status, headers = await _read_head(connection.reader)
            content = await _read_content(connection.reader, headers, take)
            is_free = headers.get("connection") != "close"
        except asyncio.IncompleteReadError as error:
            raise ConnectionError("The connection was closed before the end of the answer") from error
        finally:
            if is_free:
                connection.free_since = time.monotonic()
                self._free.append(connection)
            else:
                connection.writer.close()
        return Response(status, headers, content)

    async def _connection(self) -> _Connection:
        while self._free:
            connection = self._free.pop()
            if connection.is_usable:
                return connection
            connection.writer.close()
        return _Connection(*await asyncio.open_connection(self._host, self._port))


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Returns the status and the headers of an answer."""
    first, *lines = (await reader.readuntil(b"\r\n\r\n"))[:-4].decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(first.split()[1]), headers


async def _read_content(
    reader: asyncio.StreamReader, headers: Mapping[str, str], take: Callable[[bytes], object] | None
) -> bytes:
    """Returns the content of an answer, or calls `take` with each of its chunks."""
    if "content-length" in headers:
        return await reader.readexactly(int(headers["content-length"]))
    if "transfer-encoding" not in headers:  # the content ends with the connection
        return await reader.read()
    chunks = list[bytes]()
    while size := int(await reader.readuntil(b"\r\n"), 16):
        (take or chunks.append)((await reader.readexactly(size + 2))[:-2])
    await reader.readuntil(b"\r\n")
    return b"".join(chunks)
