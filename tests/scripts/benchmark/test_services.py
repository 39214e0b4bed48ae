"""Tests of starting, suspending and stopping services, with services of a few lines of Python."""

import http.server
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from scripts.benchmark.services import Contestant, Metrics, Running, all_started, started
from scripts.common.errors import ScriptError

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

GREY_SHEET = """
import io, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from PIL import Image
class Answer(BaseHTTPRequestHandler):
    def do_POST(self):
        sheet = io.BytesIO()
        Image.new("L", (int(sys.argv[3]),) * 2, int(sys.argv[2])).save(sheet, "PNG")
        self.send_response(200)
        self.end_headers()
        self.wfile.write(sheet.getvalue())
HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""
RUNNING = {psutil.STATUS_RUNNING, psutil.STATUS_SLEEPING}


def rss_anon(pid: int) -> float:
    """Returns RssAnon of /proc/PID/status, in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon:"))


def grey(name: str, level: int, size: int = 56, *, is_of_our_network: bool = True) -> Contestant:
    arguments = ("-c", GREY_SHEET, "{port}", str(level), str(size))
    return Contestant(name, arguments, is_of_our_network=is_of_our_network)


def state(running: Running) -> str:
    return psutil.Process(running.pid).status()


def wait_for_state(running: Running, wanted: set[str]) -> None:
    deadline = time.monotonic() + 60
    while state(running) not in wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    assert state(running) in wanted


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
    """Waits until the condition is true. If it stays false, pytest's timeout fails the test."""
    while not condition():
        time.sleep(0.01)


def test_metrics_have_samples_without_labels_and_histograms() -> None:
    with serving(200, SCRAPE) as running:
        metrics = running.metrics()
    assert metrics.values == {
        "unfog_batch_rows_count": 5.0,
        "unfog_batch_rows_sum": 12.0,
        "unfog_network_seconds_total": 1.5,
    }
    assert metrics.buckets == {"unfog_batch_rows": {1.0: 3.0, float("inf"): 5.0}}


def test_metrics_are_empty_for_a_service_without_metrics() -> None:
    with serving(404, b"") as running:
        assert running.metrics() == Metrics()


def test_resources_and_signals_include_child_processes() -> None:
    with started(Contestant("parent", ("-c", WITH_A_CHILD, "{port}"))) as running:
        parent = psutil.Process(running.pid)
        (child,) = parent.children()
        found = running.resources()
        assert found.descriptors == parent.num_fds() + child.num_fds()
        assert found.threads == parent.num_threads() + child.num_threads()
        assert 0 < found.megabytes <= (parent.memory_info().rss + child.memory_info().rss) / 2**20
        assert found.anonymous_megabytes == pytest.approx(sum(map(rss_anon, (parent.pid, child.pid))), rel=0.1)
        with running.stopped():
            wait_for(lambda: {parent.status(), child.status()} == {psutil.STATUS_STOPPED})
        wait_for(lambda: psutil.STATUS_STOPPED not in {parent.status(), child.status()})
    assert not parent.is_running()
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)  # the parent cannot reap it


def test_resources_of_an_ended_process_are_zero() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    found = Running("http://127.0.0.1:9", process.pid, 0.0).resources()
    assert (found.megabytes, found.descriptors, found.threads) == (0, 0, 0)


def test_all_services_are_suspended_except_in_their_turn() -> None:
    with all_started([grey("a", 7), grey("b", 7)]) as running:
        a, b = running["a"], running["b"]
        for one in (a, b):
            wait_for_state(one, {psutil.STATUS_STOPPED})
        with a.turn():
            wait_for_state(a, RUNNING)
            assert state(b) == psutil.STATUS_STOPPED
        wait_for_state(a, {psutil.STATUS_STOPPED})
    assert not any(psutil.pid_exists(one.pid) for one in (a, b))


@pytest.mark.parametrize(
    "odd", [grey("odd", 9), grey("odd", 7, size=28), grey("odd", 7, size=28, is_of_our_network=False)]
)
def test_service_with_different_images_is_rejected(odd: Contestant) -> None:
    with pytest.raises(ScriptError, match="odd and a generate different images"), all_started([grey("a", 7), odd]):
        pass


@pytest.mark.parametrize("other", [grey("b", 8), grey("b", 200, is_of_our_network=False)])
def test_rounding_differences_and_other_networks_are_accepted(other: Contestant) -> None:
    with all_started([grey("a", 7), other]) as running:
        assert list(running) == ["a", "b"]
