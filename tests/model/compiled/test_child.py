import importlib
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from model.compiled.child import ChildError, call_in_child

SECONDS = 100


def test_child_receives_arguments_and_environment_variables(tmp_path: Path) -> None:
    call_in_child(os.mkdir, tmp_path / "made", seconds=SECONDS)
    assert (tmp_path / "made").is_dir()
    with pytest.raises(ChildError, match="OWN_VARIABLE"):
        call_in_child(
            exec, "import os; raise ValueError(os.environ['OWN'])", seconds=SECONDS, variables={"OWN": "OWN_VARIABLE"}
        )


def test_child_crash_is_an_error_with_the_signal() -> None:
    with pytest.raises(ChildError, match=r"^child process ended by SIGABRT$"):
        call_in_child(os.abort, seconds=SECONDS)


def test_child_that_exceeds_the_timeout_is_stopped() -> None:
    with pytest.raises(ChildError, match=r"^child process gave no result within 1 s$"):
        call_in_child(time.sleep, 600, seconds=1)


def test_child_alarm_is_an_error() -> None:
    with pytest.raises(ChildError, match=r"^child process gave no result in time$"):
        call_in_child(exec, "import signal; signal.alarm(1); signal.pause()", seconds=SECONDS)


def test_child_exception_is_one_line() -> None:
    with pytest.raises(ChildError, match=r"^first line$"):
        call_in_child(exec, "raise ValueError('first line\\nsecond line')", seconds=SECONDS)


def test_child_os_error_is_raised_as_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        call_in_child(os.stat, tmp_path / "missing", seconds=SECONDS)


def test_child_exit_without_result_is_an_error() -> None:
    with pytest.raises(ChildError, match=r"^child process ended with status 7$"):
        call_in_child(os._exit, 7, seconds=SECONDS)


def test_child_ignores_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module in the current folder must not replace a module of the service or of Python."""
    (tmp_path / "json.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry] + [str(Path(__file__).parents[3])])
    call_in_child(importlib.import_module, "json", seconds=SECONDS)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_child_ends_with_its_parent(tmp_path: Path) -> None:
    started = tmp_path / "started"
    write = f"import os, pathlib, time; pathlib.Path({str(started)!r}).write_text(str(os.getpid())); time.sleep(600)"
    code = f"from model.compiled.child import call_in_child; call_in_child(exec, {write!r}, seconds=600)"
    parent = os.spawnve(os.P_NOWAIT, sys.executable, [sys.executable, "-c", code], os.environ)
    end = time.monotonic() + SECONDS
    while not (started.exists() and started.read_text()):
        assert time.monotonic() < end
        time.sleep(0.05)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    child = int(started.read_text())
    while _runs(child):
        assert time.monotonic() < end
        time.sleep(0.05)


def _runs(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False
    return "State:\tZ" not in status
