"""Runs the service as a separate process, as an operator would."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.e2e.fork import THREADS, Fork

ROOT = Path(__file__).parents[2]
TIMEOUT = 60  # seconds to wait for an expected event before the test fails; not a performance limit
START_TIMEOUT = 240  # seconds for a start, which may compile; less than pytest's timeout for a test
BASE = {
    **THREADS,
    "UNFOG_NUM_THREADS": "1",
    "UNFOG_PORT": "0",
    "UNFOG_DEVICE": "cpu",
    "UNFOG_COMPILE": "off",  # compiling takes half a minute; test_compiled.py tests it
    "UNFOG_CLIP": "off",  # loading CLIP takes seconds; the tests of CLIP set another value
}


class Process:
    """Runs `python -m app` with the given environment variables and keeps every line of its stderr.

    UNFOG_ variables of the test process are not passed on. After `stop_reading` the pipe fills up, apart from a few
    kilobytes in the reader's buffer. `is_forked` saves the time of the imports.
    """

    def __init__(self, module: str = "app", *, is_forked: bool = False, **variables: str) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("UNFOG_")}
        environment = clean | BASE | variables
        self._process: subprocess.Popen[str] | Fork
        if is_forked:
            self._process = Fork(module, str(ROOT), environment)
        else:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        self.lines: list[str] = []
        self._may_read = threading.Event()
        self._may_read.set()
        self._news: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_until_ready(self) -> str:
        """Returns the URL in the log line `Ready`. Fails if the process ends before that."""
        deadline = time.monotonic() + START_TIMEOUT
        while (line := self._news.get(timeout=deadline - time.monotonic())) is not None:
            fields = json.loads(line) if line.startswith("{") else {}
            if fields.get("message") == "Ready":
                return str(fields["url"])
        raise AssertionError(f"the process ended before it was ready: {self.lines}")

    @property
    def pid(self) -> int:
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def stop_reading(self) -> None:
        """Stops reading stderr, like a log reader that stalls."""
        self._may_read.clear()

    def resume_reading(self) -> None:
        self._may_read.set()

    def wait(self) -> int:
        """Waits until the process exits, reads the rest of its stderr and returns the exit status."""
        status = self._process.wait(TIMEOUT)
        self.resume_reading()
        self._reader.join(TIMEOUT)
        return status

    def kill(self) -> None:
        """Kills the process if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
        self.wait()

    def _read(self) -> None:
        assert self._process.stderr
        with self._process.stderr as stderr:
            for line in stderr:
                self._may_read.wait()
                self.lines.append(line.rstrip("\n"))
                self._news.put(line)
        self._news.put(None)


def wait_until(condition: Callable[[], Any], description: str, timeout: float = TIMEOUT) -> None:
    """Polls the condition until it is true. Fails after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"after {timeout} s still not true: {description}"
        time.sleep(0.02)
