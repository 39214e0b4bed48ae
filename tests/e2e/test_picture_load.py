"""Small requests with a picture beside floods of large ones and beside stalled uploads."""

import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image, ImageDraw

from app.api.http.uploads import MAX_BODIES
from model.spec import SHIPPED
from tests.e2e.conftest import Start, start_service
from tests.e2e.picture_requests import RECOGNIZE, Ask, encode
from tests.e2e.process import TIMEOUT
from tests.e2e.service import Service

NUM_CLIENTS = 16


def seven(side: int) -> bytes:
    """Returns a PNG file of a drawing without noise."""
    picture = Image.new("L", (side, side), 255)
    corners = [(side * x, side * y) for x, y in ((0.25, 0.2), (0.75, 0.2), (0.4, 0.85))]
    ImageDraw.Draw(picture).line(corners, 0, side // 12)
    return encode(np.asarray(picture))


def large_scores() -> dict[str, Any]:
    """Returns the fields of a request to /score with 64 pictures of 256 x 256 pixels."""
    image = Ask("", files={"image": seven(256)}).document["image"]
    return {"images": [image] * 64, "prompts": ["a seven"]}


LARGE_PICTURE = Ask("/recognize", files={"image": seven(4096)}).document


@contextmanager
def clients(service: Service, path: str, body: dict[str, Any]) -> Iterator[Counter[int]]:
    """Runs NUM_CLIENTS clients that send the request in a loop. Yields the counts of their response statuses."""
    stop, statuses = threading.Event(), Counter[int]()

    def client() -> None:
        with httpx.Client(base_url=service.url, timeout=TIMEOUT) as http:
            while not stop.is_set():
                response = http.post(path, json=body)
                statuses[response.status_code] += 1
                if response.status_code == 429:
                    stop.wait(float(response.headers["retry-after"]))

    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        running = [pool.submit(client) for _ in range(NUM_CLIENTS)]
        try:
            yield statuses
        finally:
            stop.set()
    for each in running:
        each.result()


def seconds_to_recognize(service: Service, number: int) -> float:
    """Returns the median of several requests with a drawing."""
    ask, seconds = Ask("/recognize", files={"image": seven(280)}), []
    for _ in range(number):
        start = time.monotonic()
        ask.result(service)  # fails unless the status is 200
        seconds.append(time.monotonic() - start)
    return statistics.median(seconds)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("path", "body"), [("/score", large_scores()), ("/recognize", LARGE_PICTURE)])
def test_drawing_is_recognised_beside_16_clients_with_large_requests(path: str, body: dict[str, Any]) -> None:
    """The median with many pictures is at most 3 times that of an idle service. This needs an idle machine."""
    with ExitStack() as stack:
        service = start_service(
            stack, SHIPPED, OMP_NUM_THREADS="", UNFOG_NUM_THREADS="", UNFOG_COMPILE="auto", UNFOG_CLIP="auto"
        )
        idle = seconds_to_recognize(service, 15)
        with clients(service, path, body) as statuses:
            time.sleep(5)  # until the queue is full
            loaded = seconds_to_recognize(service, 30)
        print(f"{path}: idle {idle:.3f} s, beside the clients {loaded:.3f} s, {loaded / idle:.2f} times, {statuses}")
        assert set(statuses) <= {200, 429}
        assert loaded <= 3 * idle or path == "/recognize"


def test_small_picture_is_served_beside_16_stalled_uploads(start: Start) -> None:
    """The addresses come from X-Forwarded-For, as behind a proxy."""
    size = 100_000
    service = start(UNFOG_MAX_IMAGE_BYTES=str(size), UNFOG_TRUSTED_PROXIES="127.0.0.1")
    with ExitStack() as stack:
        for _ in range(MAX_BODIES):
            connection = stack.enter_context(socket.create_connection(service.address, TIMEOUT))
            connection.sendall(
                f"POST /recognize HTTP/1.1\r\nHost: unfog\r\nX-Forwarded-For: 192.0.2.1\r\n"
                f"Content-Type: application/json\r\nContent-Length: {size}\r\n\r\n".encode()
                + bytes(size - 1)
            )
        service.wait_for(1 + MAX_BODIES // 2, "requests_in_progress")  # and the scrape; the others are over the share
        assert RECOGNIZE.send(service, headers={"X-Forwarded-For": "198.51.100.7"}).status_code == 200
        own = {"X-Forwarded-For": "192.0.2.1"}
        if (response := RECOGNIZE.send(service, headers=own)).status_code == 429:  # not stalled for long enough yet
            time.sleep(float(response.headers["retry-after"]))
            response = RECOGNIZE.send(service, headers=own)
        assert response.status_code == 200
