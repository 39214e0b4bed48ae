import http.server
import threading

import pytest

from scripts.benchmark.loads import Load, clients_of_one, disturbed, guided, large, mixed, one


@pytest.mark.parametrize(
    ("load", "plain"),
    [
        (clients_of_one(4), True),
        (large(), True),
        (Load("open", asks=one, rate=1.0), True),
        (Load("guided", (one, guided(one))), False),
        (Load("mixed", asks=mixed, rate=1.0), False),
    ],
)
def test_a_load_is_plain_where_every_image_takes_a_hundred_calls(load: Load, plain: bool) -> None:
    assert load.is_plain is plain


class Counting(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    asked = threading.Semaphore(0)

    def do_GET(self) -> None:
        assert self.path == "/livez"
        Counting.asked.release()
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def test_a_flood_asks_until_the_block_ends_and_says_when_it_has_ended() -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Counting)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with disturbed("flood", f"http://127.0.0.1:{server.server_port}") as goes_on:
        assert all(Counting.asked.acquire(timeout=60) for _ in range(50))
        assert goes_on()
    assert not goes_on()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("kind", ["", "busy core"])
def test_what_goes_on_needs_no_service(kind: str) -> None:
    with disturbed(kind, "http://127.0.0.1:9") as goes_on:
        assert goes_on()


def test_a_flood_that_nobody_answers_has_ended() -> None:
    with disturbed("flood", "http://127.0.0.1:9") as goes_on:
        deadline = threading.Event()
        while goes_on():
            deadline.wait(0.01)
