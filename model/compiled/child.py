"""Calls a function in a child process, so that a crash or a hang of native code does not affect this process."""

import ctypes
import json
import logging
import os
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

log = logging.getLogger(__name__)

# -I keeps the current folder out of sys.path, where -c would put it first. The child then copies the parent's sys.path.
_PROGRAM = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from model.compiled.child import main; main()"
_PR_SET_PDEATHSIG = 1  # prctl(2): the signal that the kernel sends to this process when its parent ends


class ChildError(Exception):
    """The call raised an exception, crashed or timed out. The message is one line."""


def call_in_child(
    function: Callable[..., None],
    *arguments: object,
    seconds: float,
    variables: Mapping[str, str] | None = None,
    descriptors: Sequence[int] = (),
) -> None:
    """Calls a function in a child process and waits until it returns. The result is discarded.

    Function and arguments are pickled, so the function must belong to a module. `variables` are added to the
    environment of the child. `descriptors` stay open in the child. The child is a new interpreter, because a fork
    without exec is unsafe in a process with threads. Raises OSError if the function does. Raises ChildError for every
    other exception, after a crash, and if the call takes longer than `seconds`.
    """
    path = [entry or str(Path.cwd()) for entry in sys.path]
    command = [sys.executable, "-I", "-c", _PROGRAM, json.dumps(path)]
    environment = {**os.environ, **(variables or {})}
    call = pickle.dumps((function, arguments))
    try:
        done = subprocess.run(
            command, input=call, capture_output=True, env=environment, pass_fds=descriptors, timeout=seconds
        )
    except subprocess.TimeoutExpired as error:
        raise ChildError(f"child process gave no result within {seconds:.0f} s") from error
    stderr = done.stderr.decode(errors="replace")
    log.debug("Child process ended", extra={"status": done.returncode, "stderr": stderr})
    if done.returncode == -signal.SIGALRM:
        raise ChildError("child process gave no result in time")
    if done.returncode < 0:
        raise ChildError(f"child process ended by {signal.Signals(-done.returncode).name}")
    if done.returncode:
        kind, reason = _failure(done.stdout, done.returncode)
        raise OSError(reason) if kind == "OSError" else ChildError(reason)


def main() -> None:
    """Runs in the child. Reads the call from stdin. Prints the type and message of an exception to stdout as JSON."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    function, arguments = pickle.load(sys.stdin.buffer)
    try:
        function(*arguments)
    except Exception as error:
        kind = "OSError" if isinstance(error, OSError) else type(error).__name__
        print(json.dumps([kind, f"{error}".splitlines()[0] if f"{error}" else kind]))
        sys.exit(1)


def _failure(output: bytes, status: int) -> tuple[str, str]:
    lines = output.decode(errors="replace").splitlines()
    try:
        kind, reason = json.loads(lines[-1])
    except (IndexError, ValueError):
        return "", f"child process ended with status {status}"
    return kind, reason
