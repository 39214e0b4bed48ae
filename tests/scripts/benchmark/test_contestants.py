"""What is read of a service's processes and of its metrics."""

import http.server
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil

from scripts.benchmark.contestants import Contestant, Metrics, Running, started

WITH_A_CHILD = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; open('/dev/null'); time.sleep(600)"])
from http.server import BaseHTTPRequestHandler, HTTPServer
class Answer(BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_response(200)
        self.end_headers()
HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""

SCRAPE = b"""# TYPE unfog_batch_rows histogram
unfog_batch_rows_bucket{le="1.0"} 3.0
unfog_batch_rows_bucket{le="+Inf"} 5.0
unfog_batch_rows_count 5.0
unfog_batch_rows_sum 12.0
# TYPE unfog_network_seconds counter
unfog_network_seconds_total 1.5
# TYPE unfog_requests counter
unfog_requests_total{code="200",route="/generate"} 7.0
"""


@contextmanager
def serving(status: int, body: bytes) -> Iterator[Running]:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/metrics"
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Running(f"http://127.0.0.1:{server.server_port}", os.getpid(), 0.0)
        server.shutdown()
        thread.join()


def wait_for(condition: Callable[[], bool]) -> None:
    """Waits until the condition is true. The timeout of the test ends it."""
    while not condition():
        time.sleep(0.01)


def test_a_scrape_has_the_samples_without_labels_and_the_histograms() -> None:
    with serving(200, SCRAPE) as running:
        metrics = running.metrics()
    assert metrics.values == {
        "unfog_batch_rows_count": 5.0,
        "unfog_batch_rows_sum": 12.0,
        "unfog_network_seconds_total": 1.5,
    }
    assert metrics.buckets == {"unfog_batch_rows": {1.0: 3.0, float("inf"): 5.0}}


def test_a_service_without_metrics_has_none() -> None:
    with serving(404, b"") as running:
        assert running.metrics() == Metrics()


def test_resources_and_signals_are_those_of_the_service_and_its_children() -> None:
    with started(Contestant("parent", ("-c", WITH_A_CHILD, "{port}"))) as running:
        parent = psutil.Process(running.pid)
        (child,) = parent.children()
        found = running.resources()
        assert found.descriptors == parent.num_fds() + child.num_fds()
        assert found.threads == parent.num_threads() + child.num_threads()
        assert 0 < found.megabytes <= (parent.memory_info().rss + child.memory_info().rss) / 2**20
        with running.stopped():
            wait_for(lambda: {parent.status(), child.status()} == {psutil.STATUS_STOPPED})
        wait_for(lambda: psutil.STATUS_STOPPED not in {parent.status(), child.status()})
    assert not parent.is_running()
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)  # the parent cannot reap it


def test_a_process_that_has_ended_uses_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    found = Running("http://127.0.0.1:9", process.pid, 0.0).resources()
    assert (found.megabytes, found.descriptors, found.threads) == (0, 0, 0)
