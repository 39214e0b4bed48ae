"""Clients of whom nobody wants to hear: they stop in the middle, do not read, close one side, or speak no HTTP."""

import asyncio
import json
import random
import socket
import time
from contextlib import suppress
from urllib.parse import urlsplit

STAYS_SECONDS = 12.0  # of one that says or reads nothing, unless it is thrown out before

_BODY = json.dumps({"digit": 7, "count": 16, "num_steps": 20, "scale": 8}).encode()
_HEAD = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n" % len(_BODY)
_STREAM = b"Accept: text/event-stream\r\n\r\n"
MANNERS = {  # what each sends, and what it does then
    "is silent": (b"", "stays"),
    "stops in the head": (_HEAD[:40], "stays"),
    "stops in the body": (_HEAD + b"\r\n" + _BODY[:5], "stays"),
    "does not read": ((_HEAD + b"\r\n" + _BODY) * 20, "stays"),
    "does not read its stream": (_HEAD + _STREAM + _BODY, "stays"),
    "closes its side": (_HEAD + b"\r\n" + _BODY, "closes its side"),
    "resets": (_HEAD + b"\r\n" + _BODY, "resets"),
    "sends more and resets": (_HEAD + b"\r\n" + _BODY + b"\r\n", "resets"),
    "speaks no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", "stays"),
    "sends a bomb": (_HEAD.replace(b"%d" % len(_BODY), b"16000") + b"\r\n" + b"[" * 16_000, "stays"),
}


async def rude(url: str, choose: random.Random, end: float) -> None:
    """One after the other, until the end; how each is treated is not its concern."""
    host, port = urlsplit(url).hostname or "", urlsplit(url).port or 80
    while time.monotonic() < end:
        sends, then = MANNERS[choose.choice(list(MANNERS))]
        with suppress(OSError, TimeoutError):
            await _behave(host, port, sends, then, min(STAYS_SECONDS, max(0.0, end - time.monotonic())))


async def _behave(host: str, port: int, sends: bytes, then: str, seconds: float) -> None:
    """Without asyncio's streams, which read of themselves."""
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setblocking(False)
        await loop.sock_connect(client, (host, port))
        async with asyncio.timeout(seconds):
            await loop.sock_sendall(client, sends)
            if then == "stays":
                await asyncio.sleep(seconds)
            elif then == "closes its side":
                client.shutdown(socket.SHUT_WR)
                while await loop.sock_recv(client, 65536):
                    pass
            else:  # a linger of no time is a reset
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
