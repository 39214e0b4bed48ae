"""What else goes on while a service is measured; each stops by itself when its block ends."""

import http.client
import multiprocessing
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

FLOOD_CONNECTIONS = 8


@contextmanager
def disturbance(kind: str, url: str) -> Iterator[None]:
    """`busy core`: a process that computes without end; `flood`: one that asks GET /livez as fast as it is answered."""
    if not kind:
        yield
        return
    process = multiprocessing.get_context("spawn").Process(target=_RUNS[kind], args=(url,), daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def _spin(url: str) -> None:
    while True:
        pass


def _flood(url: str) -> None:
    for _ in range(FLOOD_CONNECTIONS):
        threading.Thread(target=_ask_for_ever, args=(urlsplit(url).netloc,)).start()


def _ask_for_ever(address: str) -> None:
    connection = http.client.HTTPConnection(address)
    while True:
        connection.request("GET", "/livez")
        connection.getresponse().read()


_RUNS = {"busy core": _spin, "flood": _flood}
