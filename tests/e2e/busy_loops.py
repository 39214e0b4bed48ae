"""Processes that use all the CPU time that they get."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 1200  # a loop ends after this time if the test is killed
LOOP = f"import time\nend = time.monotonic() + {SECONDS}\nwhile time.monotonic() < end: pass"


@contextmanager
def busy_loops(number: int) -> Iterator[None]:
    """Runs processes that use all the CPU time that they get. Each has its own session.

    Linux gives each session the same share of the CPU time if sched_autogroup is enabled.
    """
    loops = [subprocess.Popen([sys.executable, "-c", LOOP], start_new_session=True) for _ in range(number)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
