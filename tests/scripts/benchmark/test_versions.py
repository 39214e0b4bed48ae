"""Tests of the comparison of versions, with servers whose answers take a known processor time."""

from typing import Any

import pytest

from scripts.benchmark import versions
from scripts.benchmark.loads import ANSWERS_TO_ONE, ROWS_OF_ALL, Load, many, one
from scripts.benchmark.services import Contestant
from scripts.benchmark.versions import BASE, NEW, _Reading, compare_versions, versions_table
from scripts.common.errors import ScriptError

SERVER = """
import io, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from PIL import Image

port, seconds, failing_after = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
sheet, lock, answers = io.BytesIO(), threading.Lock(), 0
Image.new("L", (28, 28)).save(sheet, "PNG")


class Answer(BaseHTTPRequestHandler):
    def do_POST(self):
        global answers
        self.rfile.read(int(self.headers["Content-Length"]))
        with lock:
            end = time.thread_time() + seconds
            while time.thread_time() < end:
                pass
            answers += 1
            self.send_response(200 if answers <= failing_after else 500)
        self.end_headers()
        self.wfile.write(sheet.getvalue())

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"unfog_batch_rows_sum %d\\nunfog_batch_rows_count %d\\n" % (10 * answers, answers))

    def log_message(self, *args):
        pass


ThreadingHTTPServer(("127.0.0.1", port), Answer).serve_forever()
"""


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "TURN_SECONDS", 0.1)
    monkeypatch.setattr(versions, "SPREAD_SECONDS", 0.2)


def server(name: str, seconds: float, failing_after: int = 1_000_000) -> Contestant:
    return Contestant(name, ("-c", SERVER, "{port}", str(seconds), str(failing_after)))


@pytest.mark.parametrize(
    ("load", "unit"),
    [(Load("4 x 1 image", (one,) * 4), ROWS_OF_ALL), (Load("1 x 1 image and 1 x 64", (one, many)), ANSWERS_TO_ONE)],
)
def test_faster_version_has_a_higher_rate(load: Load, unit: str) -> None:
    pairs = list[dict[str, Any]]()
    compare_versions(server(BASE, 0.02), server(NEW, 0.002), {load: unit}, 2, 1.0, pairs.append)
    assert [(found["load"], found["pair"], found["unit"]) for found in pairs] == [
        (load.name, 0, unit),
        (load.name, 1, unit),
    ]
    assert sum(found[NEW] for found in pairs) > sum(found[BASE] for found in pairs)
    assert all(found["rows_a_step"] == [10.0, 10.0] for found in pairs)


@pytest.mark.parametrize(("unit", "rate"), [(ROWS_OF_ALL, 30.0), (ANSWERS_TO_ONE, 3.0)])
def test_rate_is_the_count_in_a_pair_divided_by_the_time_of_its_turns(unit: str, rate: float) -> None:
    start, end = (
        _Reading(seconds=1.0, rows=20, steps=4, answers=5),
        _Reading(seconds=3.0, rows=80, steps=10, answers=11),
    )
    assert end.since(start, unit) == (rate, 10.0)


def test_pairs_before_a_failed_request_are_reported() -> None:
    load, pairs = Load("2 x 1 image", (one,) * 2), list[dict[str, Any]]()
    with pytest.raises(ScriptError, match="'one' was answered with status 500"):
        compare_versions(server(BASE, 0.01), server(NEW, 0.01, 100), {load: ROWS_OF_ALL}, 100, 0.2, pairs.append)
    assert 0 < len(pairs) < 100


def test_service_without_progress_gives_an_error() -> None:
    load = Load("1 x 1 image", (one,))
    with pytest.raises(ScriptError, match="no progress"):
        compare_versions(server(BASE, 0.01), server(NEW, 0.4), {load: ANSWERS_TO_ONE}, 1, 0.1, [].append)


def test_table_has_medians_and_the_range_of_the_ratios() -> None:
    pairs = [
        {"load": "a", "pair": k, "unit": "rows/s", BASE: base, NEW: new, "rows_a_step": [60.0, 40.0]}
        for k, (base, new) in enumerate([(100.0, 90.0), (200.0, 220.0), (150.0, 150.0)])
    ]
    assert versions_table(pairs) == [["a", "rows/s", "150", "150", "1 (0.9 - 1.1)", "60 and 40"]]
