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
from scripts.benchmark.replicas import CLIENTS, FEW_STEPS, FEW_STEPS_CLIENTS, NUM_STEPS, Inputs, Loop, Replicas
from scripts.common.errors import ScriptError
from tests.scripts.forked_service import ForkedService
from tests.scripts.tiny_checkpoint import save_tiny_checkpoint

MODEL = ReplicaModel({1: 2e-3, 2: 3e-3, 4: 5e-3, 8: 8e-3, 16: 15e-3, 32: 30e-3}, request_seconds=2e-3, max_batch=32)


def simulated_loop(clients: int, num_steps: int, seconds: float = 20.0) -> Loop:
    """Runs a closed loop on a simulated replica. The clients start at equal intervals."""
    request = JobRequest(Options(0, 0, num_steps, "dpmpp", 1.0), 1, timeout=1e6)
    replica, num_steps_run, num_rows, now = Replica(MODEL), 0, 0, 0.0
    arrivals = [k / clients for k in range(clients)]
    heapq.heapify(arrivals)
    while now < seconds:
        if replica.ends_at is not None and (not arrivals or replica.ends_at <= arrivals[0]):
            now, rows = replica.ends_at, len(replica._backlog.batch.rows)
            for done in replica.end_step().values():
                heapq.heappush(arrivals, done)
            if now > 1.0:  # all clients have started
                num_steps_run, num_rows = num_steps_run + 1, num_rows + rows
        else:
            now = heapq.heappop(arrivals)
            replica.submit(Job(request, now), now)
    return Loop(num_rows / num_steps_run, (now - 1.0) / num_steps_run)


def test_inputs_are_those_of_a_simulated_service() -> None:
    loops = {clients: simulated_loop(clients, NUM_STEPS) for clients in CLIENTS}
    inputs = Inputs.of(loops, simulated_loop(FEW_STEPS_CLIENTS, FEW_STEPS))
    assert inputs.request_seconds == pytest.approx(MODEL.request_seconds, rel=0.1)
    for rows, seconds in MODEL.seconds_by_rows.items():
        assert inputs.seconds_by_rows[rows] == pytest.approx(seconds, rel=0.03), rows
    assert inputs.capacity == pytest.approx(2 / (NUM_STEPS * 30e-3 / 32 + MODEL.request_seconds), rel=0.03)


def test_mean_of_inputs_is_that_of_each_value() -> None:
    mean = Inputs({1: 1.0, 2: 2.0}, 0.25, 30.0).mean(Inputs({1: 2.0, 2: 3.0}, 0.75, 40.0))
    assert mean == Inputs({1: 1.5, 2: 2.5}, 0.5, 35.0)


def test_inputs_that_are_not_positive_are_refused() -> None:
    loops = {clients: Loop(clients, 0.01 * clients) for clients in CLIENTS}
    with pytest.raises(ScriptError, match="other programs use this machine"):
        Inputs.of(loops, Loop(FEW_STEPS_CLIENTS, 0.01))


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
    tiny, loops, cores = save_tiny_checkpoint(tmp_path / "tiny.safetensors"), list[Loop](), os.sched_getaffinity(0)
    monkeypatch.setenv("UNFOG_CHECKPOINT", str(tiny))
    monkeypatch.setenv("UNFOG_COMPILE", "off")
    forks = SimpleNamespace(Popen=ForkedService, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(services, "subprocess", forks)
    monkeypatch.setattr(replicas, "SETTLE_SECONDS", 0.2)
    monkeypatch.setattr(replicas, "LOOP_SETTLE_SECONDS", 0.1)
    monkeypatch.setattr(replicas, "NUM_STEPS", 5)

    def measure_inputs(running: Replicas, seconds: float) -> Inputs:
        """Measures one loop. The times of so short loops are not reliable, so the result has other ones."""
        loops.append(asyncio.run(replicas._loop(running, 2, replicas.NUM_STEPS, seconds)))
        return Inputs({1: 0.01, 2: 0.015}, 0.001, 40.0)

    monkeypatch.setattr(replicas, "measure_inputs", measure_inputs)
    out = tmp_path / "replicas.json"
    bench.main(["replicas", "--repeats=1", "--seconds=1", "--loop-seconds=0.3", f"--out={out}"])
    content = json.loads(out.read_text())
    assert all(1 <= loop.rows <= 4 and loop.seconds > 0 for loop in loops)
    assert [row["share"] for row in content["rows"]] == [0.5, 0.7, 0.9]
    for row in content["rows"]:
        assert row["rate"] == 40 * row["share"]
        assert row["requests"] > 5
        assert row["rows"] >= 1
        assert 0 < row["measured"]["p50"] <= row["measured"]["p95"] <= row["measured"]["p99"]
        assert row["simulated"]["p50"] > 5 * 0.01
        assert set(row["cores"]) == {"clients", "HAProxy", "replicas"}
    assert content["compiled"] is False
    sizes = content["sizes"]
    assert sizes["png"] > 300 and sizes["json"] > 4 / 3 * sizes["png"] > sizes["preview"] > 100
    assert 100 < sizes["series"] < 1000
    assert os.sched_getaffinity(0) == cores
    assert "| share of the capacity | requests/s |" in capsys.readouterr().out
