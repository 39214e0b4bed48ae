"""The end at any moment of a start, and a start after an end that nobody chose."""

import random
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from model.checkpoint import SHIPPED
from tests.e2e.conftest import Start, start_service
from tests.e2e.process import PATIENCE, Process, eventually
from tests.e2e.service import Service

WORK = {"digit": 4, "count": 4, "seed": 4}


def catches(process: Process, number: signal.Signals) -> bool:
    """Before that, Python itself is being started, and nobody could answer for the end."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))
    return bool(caught >> (number - 1) & 1)


def ended_after(seconds: float, number: signal.Signals, **variables: str) -> Process:
    """A process that got a signal so long after its program was started, and has ended."""
    process = Process(**variables)
    try:
        eventually(lambda: catches(process, signal.SIGTERM), "the program runs")
        time.sleep(seconds)
        process.signal(number)
        process.wait()
    finally:
        process.end()
    return process


def test_sigterm_while_it_warms_up_is_a_clean_end(checkpoint: Path) -> None:
    process = Process("tests.e2e.faulty", UNFOG_CHECKPOINT=str(checkpoint), SLOW_WARM_UP="1")
    try:
        eventually(lambda: any("warming up" in line for line in process.lines), "it warms up")
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
        assert "Traceback" not in "\n".join(process.lines)
        assert not any('"Ready"' in line for line in process.lines)
    finally:
        process.end()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_sigterm_at_thirty_moments_of_a_start_is_a_clean_end() -> None:
    """The shipped model, which warms up for seconds: some come before it is ready, some after."""
    ready = 0
    for moment in range(30):
        process = ended_after(0.35 * moment, signal.SIGTERM, UNFOG_CHECKPOINT=str(SHIPPED))
        assert (moment, process.wait()) == (moment, 0)
        assert "Traceback" not in "\n".join(process.lines)
        ready += any('"Ready"' in line for line in process.lines)
    assert 0 < ready < 30


def test_after_sigkill_in_the_midst_of_work_a_restart_is_healthy_and_draws_the_same(
    start: Start, service: Service, checkpoint: Path
) -> None:
    killed = start(UNFOG_REQUEST_TIMEOUT="300")
    with ThreadPoolExecutor() as pool:
        works = [pool.submit(killed.post, {"digit": 1, "count": 64}) for _ in range(4)]
        eventually(lambda: killed.client.get("/health").json()["queue"]["running"] > 0, "it draws")
        killed.process.signal(signal.SIGKILL)
        for work in works:
            assert work.exception(PATIENCE) is not None  # the connection breaks: nobody waits for ever
    assert killed.process.wait() == -signal.SIGKILL
    again = start()
    assert again.client.get("/health").json()["status"] == "ok"
    assert again.images(**WORK) == service.images(**WORK)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler")
def test_sigkill_while_it_compiles_spoils_no_later_start(tmp_path: Path) -> None:
    """What is left of the cache is as good as none, or good."""
    variables = {"UNFOG_CHECKPOINT": str(SHIPPED), "UNFOG_COMPILE": "on", "UNFOG_CACHE_DIR": str(tmp_path / "cache")}
    choose = random.Random(0)
    for _ in range(6):
        ended_after(choose.uniform(3, 40), signal.SIGKILL, **variables)
    with ExitStack() as stack:
        again = start_service(stack, SHIPPED, **{name: variables[name] for name in list(variables)[1:]})
        assert again.client.get("/health").json()["compiled"] is True
        fresh = {"UNFOG_COMPILE": "on", "UNFOG_CACHE_DIR": str(tmp_path / "fresh")}
        assert again.images(**WORK) == start_service(stack, SHIPPED, **fresh).images(**WORK)
