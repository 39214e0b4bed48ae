import http.server
import threading

import pytest

from scripts.benchmark.loads import Load, clients_of_one, disturbed, guided, large, mixed, one


@pytest.mark.parametrize(
    ("load", "plain"),
    [
        (clients_of_one(4), True),
        (large(), True),
        (Load("open", make_request=one, rate=1.0), True),
        (Load("guided", (one, guided(one))), False),
        (Load("mixed", make_request=mixed, rate=1.0), False),
    ],
)
def test_load_is_plain_if_every_image_takes_100_calls(load: Load, plain: bool) -> None:
    assert load.is_plain is plain


class Counting(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    requests = threading.Semaphore(0)

    def do_GET(self) -> None:
        assert self.path == "/livez"
        Counting.requests.release()
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def test_flood_sends_requests_until_the_block_ends() -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Counting)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with disturbed("flood", f"http://127.0.0.1:{server.server_port}") as is_running:
        assert all(Counting.requests.acquire(timeout=60) for _ in range(50))
        assert is_running()
    assert not is_running()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("kind", ["", "busy core"])
def test_other_disturbances_need_no_service(kind: str) -> None:
    with disturbed(kind, "http://127.0.0.1:9") as is_running:
        assert is_running()


def test_flood_ends_without_a_service() -> None:
    with disturbed("flood", "http://127.0.0.1:9") as is_running:
        deadline = threading.Event()
        while is_running():
            deadline.wait(0.01)
