"""Tests how services take turns, with services of a few lines of Python."""

import pytest

from scripts.benchmark import measurement
from scripts.benchmark.loads import Load, clients_of_one
from scripts.benchmark.measurement import Times, take_turns
from scripts.benchmark.services import Contestant, Running
from tests.scripts.benchmark.test_services import RUNNING, grey, wait_for_state

TIMES = Times(window=1.0, settle=0.0, objective=5.0)


def test_order_rotates_and_machine_is_measured_around_each_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def measure_machine() -> dict[str, int]:
        calls.append(len(calls))
        return {"call": calls[-1]}

    def measure(running: Running, contestant: Contestant, load: Load, times: Times, seed: int) -> dict[str, object]:
        wait_for_state(running, RUNNING)
        return {"contestant": contestant.name, "load": load.name, "seed": seed}

    monkeypatch.setattr(measurement, "measure", measure)
    loads = [clients_of_one(1), clients_of_one(2)]
    rows = list(take_turns([grey(name, 7) for name in "abc"], loads, TIMES, (1, 2), measure_machine))
    assert [(row["load"], row["repeat"], row["contestant"]) for row in rows] == [
        (load.name, repeat, name) for repeat, order in ((1, "bca"), (2, "cab")) for load in loads for name in order
    ]
    assert [row["adjacent"] for row in rows] == [[{"call": 2 * k}, {"call": 2 * k + 1}] for k in range(12)]
    assert all(row["repeat"] == row["seed"] for row in rows)
