import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from scripts.common.stopping import stops_soon

ROOT = Path(__file__).parents[3]
LIMIT = 60  # seconds; each work below takes longer, so only the signal ends it
PROGRAM = """
import ctypes, signal, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell inherit that it is ignored
from model.compiled.child import call_in_child
from scripts.common import stopping
from scripts.common.progress import Reporter
lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
threading.Timer(0.2, print, ["working"], {"flush": True}).start()
with Reporter(lambda: "test: stopped", stop=stopping.stops_soon):
"""
WORKS = {
    # The second call waits for ever, without Python's lock.
    "native code": """
    stopping.PATIENCE_SECONDS = 0.1
    lock(mutex)
    lock(mutex)
""",
    "code that ignores the exception": f"""
    stopping.PATIENCE_SECONDS = 0.1
    while True:
        try:
            time.sleep({LIMIT})
        except BaseException:
            pass
""",
    "child process": f"""
    call_in_child(time.sleep, {LIMIT}, seconds={LIMIT})
""",
    # The interpreter frees the object when it ends.
    "slow destructor": f"""
    class Slow:
        def __del__(self):
            time.sleep({LIMIT})
    slow = Slow()
    slow.itself = slow
    time.sleep({LIMIT})
""",
}


@pytest.mark.parametrize(
    ("work", "number"), [*((work, signal.SIGINT) for work in WORKS), ("native code", signal.SIGTERM)]
)
def test_signal_ends_the_process_before_its_work_is_done(work: str, number: signal.Signals) -> None:
    command = [sys.executable, "-c", f"{PROGRAM}{WORKS[work]}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout and process.stdout.readline() == "working\n"
            process.send_signal(number)
            _, failed = process.communicate(timeout=LIMIT - 1)
        finally:
            process.kill()
    assert (process.returncode, failed.strip()) == (128 + number, "test: stopped")


def test_block_without_a_signal_leaves_no_handler_and_no_thread() -> None:
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before, threads = [signal.getsignal(number) for number in signals], threading.active_count()
    with stops_soon(lambda number: pytest.fail("said")):
        assert threading.active_count() == threads + 1
    assert [signal.getsignal(number) for number in signals] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert threading.active_count() == threads


def test_exception_without_a_signal_does_not_end_the_process() -> None:
    said = list[int]()
    with pytest.raises(SystemExit) as exit_, stops_soon(said.append):
        raise KeyboardInterrupt
    assert (exit_.value.code, said) == (130, [signal.SIGINT])


@pytest.mark.parametrize("error", [ValueError("wrong"), SystemExit(2)])
def test_exception_of_the_block_is_raised_without_a_message(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, stops_soon(lambda number: pytest.fail("said")):
        raise error
    assert raised.value is error


@pytest.mark.parametrize("script", ["train", "evaluate", "bench"])
def test_program_that_is_stopped_during_its_imports_ends_with_a_line(script: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    stopped = subprocess.run(
        [sys.executable, "-m", f"scripts.{script}"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs of a shell ignore it
    )
    assert (stopped.returncode, stopped.stderr) == (130, f"\n{script}: stopped before it began\n")
