"""A retry with the same Idempotency-Key gets the same bytes, after a connection that was dropped."""

import hashlib
import json
import socket

import httpx

from tests.e2e.process import TIMEOUT
from tests.e2e.service import JSON, PNG, Service

KEY = "7c2a1f0e-order-4711"
BODY = {"digit": 7, "count": 4}
SEED = int("".join(f"{byte:08b}" for byte in hashlib.sha256(KEY.encode()).digest())[:53], 2)


def test_retry_after_a_dropped_connection_gets_the_same_bytes(service: Service) -> None:
    content = json.dumps(BODY).encode()
    head = f"Host: test\r\nContent-Type: {JSON}\r\nIdempotency-Key: {KEY}\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.create_connection(service.address, TIMEOUT) as connection:
        connection.sendall(f"POST /generate HTTP/1.1\r\n{head}".encode() + content)
        service.wait_until_running()
    service.wait_until_idle()
    retried = service.post(BODY, PNG, **{"idempotency-key": KEY})
    assert retried.headers["x-seed"] == str(SEED)
    assert retried.content == service.post({**BODY, "seed": SEED}, PNG).content


def test_retry_after_a_dropped_stream_gets_the_image_that_was_sent(service: Service) -> None:
    """The first response is dropped after one of its images has arrived."""
    headers = {"accept": "text/event-stream", "idempotency-key": KEY}
    with (
        httpx.Client(base_url=service.url, timeout=TIMEOUT) as client,
        client.stream("POST", "/generate", json=BODY, headers=headers) as response,
    ):
        data = (line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: "))
        sent = next(event for each in data if "png" in (event := json.loads(each)))
    retried = service.post(BODY, **{"idempotency-key": KEY}).json()
    assert retried["seed"] == SEED
    assert retried["images"][sent["index"]] == sent
