"""The service as a process of its own, as an operator starts it."""

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

ROOT = Path(__file__).parents[2]
PATIENCE = 60  # seconds after which something that should happen does not; never a measure of speed
START_PATIENCE = 240  # of a start, which may compile; less than pytest's own patience with a test
BASE = {
    "OMP_NUM_THREADS": "1",
    "UNFOG_NUM_THREADS": "1",
    "UNFOG_PORT": "0",
    "UNFOG_DEVICE": "cpu",
    "UNFOG_COMPILE": "off",  # which takes half a minute; test_compiled.py is about it
}


class Process:
    """`python -m app` with these variables and no other of ours; every line of its stderr is kept.

    While it is paused, its stderr is not read: the pipe fills, after some kilobytes in the reader's own buffer.
    """

    def __init__(self, module: str = "app", **variables: str) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("UNFOG_")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            cwd=ROOT,
            env=clean | BASE | variables,
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
        """Returns the address in the line `Ready`."""
        deadline = time.monotonic() + START_PATIENCE
        while (line := self._news.get(timeout=deadline - time.monotonic())) is not None:
            fields = json.loads(line) if line.startswith("{") else {}
            if fields.get("message") == "Ready":
                return str(fields["url"])
        raise AssertionError(f"it ended before it was ready: {self.lines}")

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal."""
        self._process.send_signal(number)

    def pause(self) -> None:
        """Stops reading its stderr."""
        self._may_read.clear()

    def resume(self) -> None:
        """Reads its stderr again."""
        self._may_read.set()

    def wait(self) -> int:
        """The exit status, once it has ended by itself; what it wrote while it was paused is read then."""
        status = self._process.wait(PATIENCE)
        self.resume()
        self._reader.join(PATIENCE)
        return status

    def end(self) -> None:
        """Leaves nothing behind, whatever state it is in."""
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


def eventually(holds: Callable[[], Any], what: str) -> None:
    """Waits, but not for ever, for what happens after the answer has been read."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, f"still not so: {what}"
        time.sleep(0.02)
