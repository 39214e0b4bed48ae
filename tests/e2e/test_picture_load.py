"""Small requests with a picture beside stalled uploads."""

import socket
import time
from contextlib import ExitStack

from app.api.uploads import MAX_BODIES
from tests.e2e.conftest import Start
from tests.e2e.picture_requests import RECOGNIZE
from tests.e2e.process import TIMEOUT


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
