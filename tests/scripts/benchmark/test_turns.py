"""Contestants that are a few lines of Python: each answers with a sheet of one grey, and counts while it runs."""

import time

import psutil
import pytest

from scripts.benchmark import turns
from scripts.benchmark.contestants import BenchError, Contestant, Running
from scripts.benchmark.loads import Load, clients_of_one
from scripts.benchmark.runs import Times
from scripts.benchmark.turns import all_started, take_turns

SERVER = """
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
TIMES = Times(window=1.0, settle=0.0, objective=5.0)


def grey(name: str, level: int, size: int = 56, *, is_of_our_network: bool = True) -> Contestant:
    arguments = ("-c", SERVER, "{port}", str(level), str(size))
    return Contestant(name, arguments, is_of_our_network=is_of_our_network)


def state(running: Running) -> str:
    return psutil.Process(running.pid).status()


def wait_for_state(running: Running, wanted: set[str]) -> None:
    deadline = time.monotonic() + 60
    while state(running) not in wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    assert state(running) in wanted


def test_all_stand_still_but_the_one_whose_turn_it_is() -> None:
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
def test_who_draws_something_else_is_not_measured(odd: Contestant) -> None:
    with pytest.raises(BenchError, match="odd draws other pictures than a"), all_started([grey("a", 7), odd]):
        pass


@pytest.mark.parametrize("alike", [grey("b", 8), grey("b", 200, is_of_our_network=False)])
def test_rounding_and_another_network_are_let_pass(alike: Contestant) -> None:
    with all_started([grey("a", 7), alike]) as running:
        assert list(running) == ["a", "b"]


def test_the_order_rotates_and_a_witness_looks_before_and_after_each_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []

    def witness() -> dict[str, int]:
        looks.append(len(looks))
        return {"look": looks[-1]}

    def measure(running: Running, contestant: Contestant, load: Load, times: Times, seed: int) -> dict[str, object]:
        wait_for_state(running, RUNNING)
        return {"contestant": contestant.name, "load": load.name, "seed": seed}

    monkeypatch.setattr(turns, "measure", measure)
    loads = [clients_of_one(1), clients_of_one(2)]
    rows = list(take_turns([grey(name, 7) for name in "abc"], loads, TIMES, (1, 2), witness))
    assert [(row["load"], row["repeat"], row["contestant"]) for row in rows] == [
        (load.name, repeat, name) for repeat, order in ((1, "bca"), (2, "cab")) for load in loads for name in order
    ]
    assert [row["beside"] for row in rows] == [[{"look": 2 * k}, {"look": 2 * k + 1}] for k in range(12)]
    assert all(row["repeat"] == row["seed"] for row in rows)
