"""Starts a service as a fork of a process that has imported its modules, because the imports take two seconds."""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from signal import Signals
from typing import TextIO
from unittest import mock

from app.runner import warm_up

THREADS = {"OMP_NUM_THREADS": "1"}  # torch reads it when it is imported, so it is the same in all forks
_context = multiprocessing.get_context("forkserver")
# Not app.__main__: runpy would warn that it is imported before it runs.
_context.set_forkserver_preload(["app.main", "app.server.server", __name__])


def can_fork(variables: Mapping[str, str]) -> bool:
    """Returns False if one of the variables is read before the fork: by torch, or by the start of Python."""
    return THREADS.items() <= {**THREADS, **variables}.items() and not any(n.startswith("PYTHON") for n in variables)


class Fork:
    """Runs `python -m MODULE`. Has those parts of the interface of subprocess.Popen that tests.e2e.process uses."""

    def __init__(self, module: str, folder: str, variables: dict[str, str]) -> None:
        with mock.patch.dict(os.environ, THREADS):
            forkserver.ensure_running()
        lines, stderr = _context.Pipe(duplex=False)
        self._process = _context.Process(target=_run, args=(module, folder, variables, stderr), daemon=True)
        self._process.start()
        stderr.close()
        self.stderr: TextIO = os.fdopen(os.dup(lines.fileno()))
        lines.close()

    @property
    def pid(self) -> int:
        assert self._process.pid
        return self._process.pid

    def send_signal(self, number: Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def poll(self) -> int | None:
        """Returns the exit status, or None if the process still runs."""
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        status = self.poll()
        assert status is not None, f"the process has not ended after {timeout} s"
        return status


def _run(module: str, folder: str, variables: dict[str, str], stderr: Connection) -> None:
    os.setpgrp()  # The benchmarks send signals to the process group of a service.
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    null = os.open(os.devnull, os.O_RDWR)
    for source, target in ((null, 0), (null, 1), (stderr.fileno(), 2)):
        os.dup2(source, target)
    os.close(null)
    stderr.close()
    warm_up.LONGEST_TIMING_SECONDS = warm_up.TIMING_SECONDS  # as on an idle machine
    sys.argv = [module]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
