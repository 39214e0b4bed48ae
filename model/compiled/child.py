"""Calls a function in a child process, where native code may crash or hang without ending this process."""

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

# The child runs with -I, since -c alone puts the current folder first in sys.path. It then takes the parent's path.
_PROGRAM = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from model.compiled.child import main; main()"
_PR_SET_PDEATHSIG = 1


class ChildError(Exception):
    """The call failed or ended its process; one sentence."""


def call_in_child(
    function: Callable[..., None],
    *arguments: object,
    seconds: float,
    variables: Mapping[str, str] | None = None,
    descriptors: Sequence[int] = (),
) -> None:
    """Calls a function of a module; its arguments are pickled, `descriptors` stay open in the child.

    Raises OSError where the function does, and ChildError for every other exception, for a crash, and if it takes
    longer than `seconds`. A fork without exec would be unsafe: this process has threads.
    """
    path = [entry or str(Path.cwd()) for entry in sys.path]
    command = [sys.executable, "-I", "-c", _PROGRAM, json.dumps(path)]
    own = {**os.environ, **(variables or {})}
    call = pickle.dumps((function, arguments))
    try:
        done = subprocess.run(command, input=call, capture_output=True, env=own, pass_fds=descriptors, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise ChildError(f"no result within {seconds:.0f} s") from error
    log.debug("Child process ended with status %d: %s", done.returncode, done.stderr.decode(errors="replace"))
    if done.returncode == -signal.SIGALRM:
        raise ChildError("no result in time")
    if done.returncode < 0:
        raise ChildError(f"ended by {signal.Signals(-done.returncode).name}")
    if done.returncode:
        kind, reason = _failure(done.stdout, done.returncode)
        raise OSError(reason) if kind == "OSError" else ChildError(reason)


def main() -> None:
    """Runs the call from standard input; on an exception its kind and message go to standard output."""
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
        return "", f"ended with status {status}"
    return kind, reason
