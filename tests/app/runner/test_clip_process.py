"""Tests of the real child process with the embedded CLIP model."""

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from app.engine.job import Pixels
from app.runner import clip_process
from app.runner.clip_process import ClipProcess, embed
from model.clip import Clip
from model.prompts import digit_prompt

pytest.importorskip("open_clip")
PROMPTS = [digit_prompt(digit) for digit in range(10)]
SHA256 = Clip().sha256
# A child process without a model. It writes a line to the file that the batch names, and ends without an answer.
ENDS_IN_EACH_CALL = """
import sys
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[2]))
connection.recv()
connection.send(None)
with open(connection.recv()[0], "a") as calls:
    calls.write("call\\n")
"""


@pytest.fixture(scope="module")
def process() -> Iterator[ClipProcess]:
    process = ClipProcess("embedded", SHA256)
    yield process
    process.close()


def images(*shape: int) -> list[Pixels]:
    return list(np.random.default_rng(0).integers(0, 256, (3, *shape), np.uint8))


@pytest.mark.parametrize(
    "batch", [PROMPTS, images(28, 28), images(28, 28, 3), images(56, 40)], ids=lambda b: str(b[0])[:9]
)
def test_embeddings_equal_those_of_this_process(process: ClipProcess, batch: list[str] | list[Pixels]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = embed(Clip(), batch)
    torch.set_num_threads(before)
    assert np.array_equal(process.call(batch), expected)


def test_process_has_the_idle_policy_and_ignores_signals_to_the_whole_service(process: ClipProcess) -> None:
    process.call(["one"])
    assert process.pid
    threads = [int(path.name) for path in Path(f"/proc/{process.pid}/task").iterdir()]
    assert {os.sched_getscheduler(thread) for thread in threads} == {os.SCHED_IDLE}
    assert os.sched_getscheduler(0) != os.SCHED_IDLE
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(process.pid, number)
    assert process.call(["one"]).shape == (1, 64)


def test_failed_call_raises_its_error_and_the_process_continues(process: ClipProcess) -> None:
    process.call(["one"])
    before = process.pid
    with pytest.raises(RuntimeError, match="ValueError: all input arrays must have the same shape"):
        process.call([*images(28, 28), *images(28, 29)])
    assert process.call(["one"]).shape == (1, 64)
    assert process.pid == before


def ended(pid: int) -> bool:
    """Waits until the process has ended. It may be a zombie then."""
    descriptor = os.pidfd_open(pid)
    try:
        return bool(select.select([descriptor], [], [], 30)[0])
    finally:
        os.close(descriptor)


def test_process_that_ends_between_two_calls_starts_again_with_the_next_call(process: ClipProcess) -> None:
    expected, before = process.call(["one"]), process.pid
    assert before
    os.kill(before, signal.SIGKILL)
    assert ended(before)
    assert np.array_equal(process.call(["one"]), expected)
    assert process.pid != before


def test_call_whose_process_is_killed_is_answered_by_a_new_process(process: ClipProcess) -> None:
    expected, before = process.call(["one"]), process.pid
    assert before
    os.kill(before, signal.SIGSTOP)  # The call waits for an answer.
    killer = threading.Timer(0.1, os.kill, (before, signal.SIGKILL))
    killer.start()
    assert np.array_equal(process.call(["one"]), expected)
    killer.join()
    assert process.pid != before


def test_batch_that_ends_its_process_twice_fails_the_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(clip_process, "_PROGRAM", ENDS_IN_EACH_CALL)
    process, calls = ClipProcess(), tmp_path / "calls"
    with pytest.raises(RuntimeError, match="the CLIP process has ended"):
        process.call([str(calls)])
    assert calls.read_text() == "call\n" * 2
    process.close()


def test_closing_ends_a_call_that_is_in_progress() -> None:
    process, failed = ClipProcess("embedded", SHA256), threading.Event()

    def call() -> None:
        with pytest.raises(RuntimeError):
            process.call(["one"])  # the start of the process takes seconds
        failed.set()

    thread = threading.Thread(target=call)
    thread.start()
    deadline = time.monotonic() + 30
    while not process.pid and time.monotonic() < deadline:
        time.sleep(0.01)
    process.close()
    assert failed.wait(30)
    thread.join()
    with pytest.raises(RuntimeError, match="closed"):
        process.call(["one"])


def test_process_ends_when_its_parent_is_killed() -> None:
    program = (
        "import sys, time; from app.runner.clip_process import ClipProcess; "
        "process = ClipProcess('embedded', sys.argv[1]); "
        "process.call(['one']); print(process.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, SHA256], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        child = int(parent.stdout.readline())
        descriptor = os.pidfd_open(child)
        parent.kill()
    assert select.select([descriptor], [], [], 30)[0]
    os.close(descriptor)


def test_process_that_does_not_answer_is_ended_and_starts_again(
    process: ClipProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    process.call(["one"])
    assert process.pid
    os.kill(process.pid, signal.SIGSTOP)
    monkeypatch.setattr(clip_process, "CALL_SECONDS", 0.1)
    with pytest.raises(RuntimeError, match="no result within"):
        process.call(["one"])
    monkeypatch.undo()
    assert process.call(["one"]).shape == (1, 64)


def test_model_that_has_changed_since_the_start_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    process = ClipProcess("embedded", "0" * 64)
    with pytest.raises(RuntimeError, match="the CLIP process has ended"):
        process.wait_until_ready()
    assert "has changed since the start of the service" in capfd.readouterr().err
    process.close()
