"""Services that are a few lines of Python take turns."""

import pytest

from scripts.benchmark import measurement
from scripts.benchmark.loads import Load, clients_of_one
from scripts.benchmark.measurement import Times, take_turns
from scripts.benchmark.services import Contestant, Running
from tests.scripts.benchmark.test_services import RUNNING, grey, wait_for_state

TIMES = Times(window=1.0, settle=0.0, objective=5.0)


def test_the_order_rotates_and_a_witness_looks_before_and_after_each_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []

    def witness() -> dict[str, int]:
        looks.append(len(looks))
        return {"look": looks[-1]}

    def measure(running: Running, contestant: Contestant, load: Load, times: Times, seed: int) -> dict[str, object]:
        wait_for_state(running, RUNNING)
        return {"contestant": contestant.name, "load": load.name, "seed": seed}

    monkeypatch.setattr(measurement, "measure", measure)
    loads = [clients_of_one(1), clients_of_one(2)]
    rows = list(take_turns([grey(name, 7) for name in "abc"], loads, TIMES, (1, 2), witness))
    assert [(row["load"], row["repeat"], row["contestant"]) for row in rows] == [
        (load.name, repeat, name) for repeat, order in ((1, "bca"), (2, "cab")) for load in loads for name in order
    ]
    assert [row["beside"] for row in rows] == [[{"look": 2 * k}, {"look": 2 * k + 1}] for k in range(12)]
    assert all(row["repeat"] == row["seed"] for row in rows)
