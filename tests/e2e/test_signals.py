"""SIGTERM at any moment of a start, and restarts after SIGKILL."""

import random
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from model.spec import SHIPPED
from tests.e2e.conftest import Start, start_service
from tests.e2e.process import TIMEOUT, Process, wait_until
from tests.e2e.service import Service

BODY = {"digit": 4, "count": 4, "seed": 4}


def handles(process: Process, number: signal.Signals) -> bool:
    """True if the process has installed a handler for the signal. While Python starts, it has none."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))
    return bool(caught >> (number - 1) & 1)


def signalled_after(seconds: float, number: signal.Signals, **variables: str) -> Process:
    """Starts a process and signals it `seconds` after it handles SIGTERM. Returns it after its exit."""
    process = Process(**variables)
    try:
        wait_until(lambda: handles(process, signal.SIGTERM), "the process handles SIGTERM")
        time.sleep(seconds)
        process.signal(number)
        process.wait()
    finally:
        process.kill()
    return process


def test_sigterm_during_warm_up_exits_with_status_0(checkpoint: Path) -> None:
    process = Process("tests.e2e.faulty_service", UNFOG_CHECKPOINT=str(checkpoint), SLOW_WARM_UP="1")
    try:
        wait_until(lambda: any("warming up" in line for line in process.lines), "the process warms up")
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
        assert "Traceback" not in "\n".join(process.lines)
        assert not any('"Ready"' in line for line in process.lines)
    finally:
        process.kill()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_sigterm_at_30_moments_of_a_start_exits_with_status_0() -> None:
    """The shipped model warms up for seconds, so that some signals arrive before `Ready` and some after."""
    ready = 0
    for moment in range(30):
        process = signalled_after(0.35 * moment, signal.SIGTERM, UNFOG_CHECKPOINT=str(SHIPPED))
        assert (moment, process.wait()) == (moment, 0)
        assert "Traceback" not in "\n".join(process.lines)
        ready += any('"Ready"' in line for line in process.lines)
    assert 0 < ready < 30


def test_restart_after_sigkill_is_healthy_and_generates_the_same_bytes(
    start: Start, service: Service, checkpoint: Path
) -> None:
    killed = start(UNFOG_REQUEST_TIMEOUT="300")
    with ThreadPoolExecutor() as pool:
        pending = [pool.submit(killed.post, {"digit": 1, "count": 64}) for _ in range(4)]
        wait_until(lambda: killed.client.get("/health").json()["queue"]["running"] > 0, "the service generates images")
        killed.process.signal(signal.SIGKILL)
        for response in pending:
            assert response.exception(TIMEOUT) is not None  # the connection breaks, so no client hangs
    assert killed.process.wait() == -signal.SIGKILL
    restarted = start()
    assert restarted.client.get("/health").json()["status"] == "ok"
    assert restarted.images(**BODY) == service.images(**BODY)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler")
def test_sigkill_while_compiling_does_not_break_later_starts(tmp_path: Path) -> None:
    """The cache that a killed process leaves is either valid or ignored."""
    variables = {"UNFOG_CHECKPOINT": str(SHIPPED), "UNFOG_COMPILE": "on", "UNFOG_CACHE_DIR": str(tmp_path / "cache")}
    choose = random.Random(0)
    for _ in range(6):
        signalled_after(choose.uniform(3, 40), signal.SIGKILL, **variables)
    with ExitStack() as stack:
        restarted = start_service(stack, SHIPPED, **{name: variables[name] for name in list(variables)[1:]})
        assert restarted.client.get("/health").json()["compiled"] is True
        fresh = {"UNFOG_COMPILE": "on", "UNFOG_CACHE_DIR": str(tmp_path / "fresh")}
        assert restarted.images(**BODY) == start_service(stack, SHIPPED, **fresh).images(**BODY)
