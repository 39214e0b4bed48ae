"""Tests of the measurement of replicas: the inputs of the simulation, the table, and a run with real services."""

import asyncio
import heapq
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from app.engine.job import Job, JobRequest, Options
from scripts import bench
from scripts.benchmark import replicas, services
from scripts.benchmark.cluster_simulation import Replica, ReplicaModel
from scripts.benchmark.replicas import (
    CLIENTS,
    FEW_STEPS,
    FEW_STEPS_CLIENTS,
    NUM_STEPS,
    Counters,
    Inputs,
    Loop,
    Loops,
    Replicas,
)
from scripts.common.errors import ScriptError
from tests.scripts.forked_service import ForkedService
from tests.scripts.tiny_checkpoint import save_tiny_checkpoint

MODEL = ReplicaModel({1: 2e-3, 2: 3e-3, 4: 5e-3, 8: 8e-3, 16: 15e-3, 32: 30e-3}, request_seconds=2e-3, max_batch=32)
DELAY = 6e-3  # of a request outside of the engine


def simulated_loop(clients: int, num_steps: int, seconds: float = 20.0) -> Loop:
    """Runs a closed loop on a simulated replica. The clients start at equal intervals."""
    request = JobRequest(Options(0, 0, num_steps, "dpmpp", 1.0), 1, timeout=1e6)
    replica, num_steps_run, num_rows, now = Replica(MODEL), 0, 0, 0.0
    arrivals = [k / clients for k in range(clients)]
    heapq.heapify(arrivals)
    while now < seconds:
        if replica.ends_at is not None and (not arrivals or replica.ends_at <= arrivals[0]):
            now, rows = replica.ends_at, len(replica._backlog.batch.rows)
            for _ in replica.end_step():
                heapq.heappush(arrivals, now + DELAY)
            if now > 1.0:  # all clients have started
                num_steps_run, num_rows = num_steps_run + 1, num_rows + rows
        else:
            now = heapq.heappop(arrivals)
            replica.submit(Job(request, now), now)
    busy = (now - 1.0) / num_steps_run - (clients == 1) * DELAY / num_steps
    return Loop(num_rows / num_steps_run, (now - 1.0) / num_steps_run, busy, DELAY)


def test_inputs_are_those_of_a_simulated_service() -> None:
    loops = {clients: simulated_loop(clients, NUM_STEPS) for clients in CLIENTS}
    inputs = Inputs.of(Loops(loops, simulated_loop(FEW_STEPS_CLIENTS, FEW_STEPS)))
    assert inputs.request_seconds == pytest.approx(MODEL.request_seconds, rel=0.1)
    assert inputs.delay_seconds == pytest.approx(DELAY)
    for rows, seconds in MODEL.seconds_by_rows.items():
        assert inputs.seconds_by_rows[rows] == pytest.approx(seconds, rel=0.03), rows
        assert inputs.usual[rows] == pytest.approx(
            seconds + (rows > 1) * rows / NUM_STEPS * MODEL.request_seconds, rel=0.03
        )
    assert inputs.capacity == pytest.approx(2 / (NUM_STEPS * 30e-3 / 32 + MODEL.request_seconds), rel=0.03)


def test_loops_are_the_means_of_all_measured_ones() -> None:
    measured = [Loops({1: Loop(1.0, k, 3 * k, 4 * k), 2: Loop(2.0, k, k, k)}, Loop(4.0, k, k, k)) for k in (1.0, 2.0)]
    assert Loops.mean(measured) == Loops({1: Loop(1.0, 1.5, 4.5, 6.0), 2: Loop(2.0, *[1.5] * 3)}, Loop(4.0, *[1.5] * 3))


def test_inputs_that_are_not_positive_are_refused() -> None:
    loops = {clients: Loop(clients, 0.01 * clients, 0.01, 0.01) for clients in CLIENTS}
    with pytest.raises(ScriptError, match="other programs use this machine"):
        Inputs.of(Loops(loops, Loop(FEW_STEPS_CLIENTS, 0.01, 0.01, 0.01)))


def test_pace_is_the_time_of_steps_in_relation_to_the_usual_time_of_as_many_rows() -> None:
    inputs = Inputs({}, 0.0, 0.0, 0.0, usual={1: 0.25, 3: 0.75})
    steady, slow, idle = Counters(1.0, 2.0, 4.0, 1.0), Counters(1.0, 1.0, 3.0, 1.5), Counters(1.0, 0.0, 0.0, 0.0)
    first, second = inputs.paces([[steady, slow], [slow, idle]])
    assert (first.factors, second.factors) == ([1.0, 2.0], [2.0, 1.0])
    assert [first.at(time) for time in (0.0, 0.9, 1.0, 7.0)] == [1.0, 1.0, 2.0, 2.0]


def test_table_has_medians_and_errors_of_each_share_and_percentile() -> None:
    rows = [
        {
            "share": share,
            "rate": 10.0,
            "requests": 100,
            "measured": dict.fromkeys(("p50", "p95", "p99"), 1.0),
            "simulated": {"p50": 0.9, "p95": error + 1, "p99": 1.2},
        }
        for share in replicas.SHARES
        for error in (-0.1, 0.05, 0.2)
    ]
    table = replicas.table_of(rows)
    assert [line[:4] for line in table[:3]] == [["0.5", "10.0", "300", name] for name in ("p50", "p95", "p99")]
    assert table[1][4:] == ["1 (1 - 1)", "1.05 (0.9 - 1.2)", "+5% (-10% - +20%)"]
    assert len(table) == 9


@pytest.mark.skipif(not shutil.which("haproxy"), reason="haproxy is not installed")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_replicas_measures_and_simulates_real_services(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny, found, cores = save_tiny_checkpoint(tmp_path / "tiny.safetensors"), list[Loop](), os.sched_getaffinity(0)
    monkeypatch.setenv("UNFOG_CHECKPOINT", str(tiny))
    monkeypatch.setenv("UNFOG_COMPILE", "off")
    forks = SimpleNamespace(Popen=ForkedService, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(services, "subprocess", forks)
    monkeypatch.setattr(replicas, "SETTLE_SECONDS", 0.2)
    monkeypatch.setattr(replicas, "LOOP_SETTLE_SECONDS", 0.1)
    monkeypatch.setattr(replicas, "NUM_STEPS", 5)

    def measure_loops(running: Replicas, seconds: float) -> Loops:
        """Measures one loop. The times of so short loops are not reliable, so the result has other ones."""
        found.append(asyncio.run(replicas._loop(running, 2, replicas.NUM_STEPS, seconds)))
        of_clients = {1: Loop(1.0, 0.01, 0.01, 0.002), 2: Loop(2.0, 0.02, 0.015, 0.002)}
        return Loops(of_clients, Loop(1.0, 0.0101, 0.01, 0.002))

    monkeypatch.setattr(replicas, "measure_loops", measure_loops)
    out = tmp_path / "replicas.json"
    bench.main(["replicas", "--repeats=1", "--seconds=1", "--loop-seconds=0.3", f"--out={out}"])
    content = json.loads(out.read_text())
    for loop in found:
        assert 1 <= loop.rows <= 4
        assert loop.seconds >= loop.step_seconds > 0
        assert 0 < loop.delay_seconds < 1
    assert content["inputs"]["delay_seconds"] == 0.002
    assert [row["share"] for row in content["rows"]] == [0.5, 0.7, 0.9]
    for row in content["rows"]:
        assert row["rate"] == 40 * row["share"]  # two replicas, each with 2 rows in 20 ms, and 5 steps
        assert row["requests"] > 5
        assert len(row["paces"]) == 2 and all(factor > 0 for factors in row["paces"] for factor in factors)
        assert row["rows"] >= 1
        assert 0 < row["measured"]["p50"] <= row["measured"]["p95"] <= row["measured"]["p99"]
        assert row["simulated"]["p50"] > 0.002
        assert set(row["cores"]) == {"clients", "HAProxy", "replicas"}
    assert content["compiled"] is False
    sizes = content["sizes"]
    assert sizes["png"] > 300 and sizes["json"] > 4 / 3 * sizes["png"] > sizes["preview"] > 100
    assert 100 < sizes["series"] < 1000
    assert os.sched_getaffinity(0) == cores
    assert "| share of the capacity | requests/s |" in capsys.readouterr().out
