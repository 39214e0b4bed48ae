"""A child process that computes embeddings with CLIP and uses only CPU time that no other process needs.

Scoring runs on the same CPU as the steps. A thread of normal priority would take CPU time from them: the compute
threads of a step wait for each other, so that a step takes as long as its slowest thread. On Linux the child process
therefore has the scheduling policy SCHED_IDLE. Measured on two cores with steps of 16 rows in compiled bfloat16: a step
took 14.5 ms without scoring, 14.75 ms with SCHED_IDLE, 15.8 ms with the nice value 19 (at most 174 ms) and 54.7 ms with
normal priority. The disadvantage is that CLIP scores only a few images per second while steps use all cores.

A thread is not used, because the threads of one process share the lock of the interpreter. If other processes use all
cores, a thread with SCHED_IDLE can hold the lock for a second without a core. The event loop and the engine then wait
for the lock.
"""

import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange

from app.engine.interface import Embeddings
from app.engine.job import Pixels
from model.clip import EMBEDDED_NAME, Clip, ClipNotInstalledError, import_open_clip
from model.pixels import from_pixels

log = logging.getLogger(__name__)

# -I keeps the current folder out of sys.path, where -c would put it first. The child then copies the parent's sys.path.
# A terminal and systemd send SIGINT and SIGTERM to all processes of the service. The parent decides when this one ends.
_PROGRAM = """
import json, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.path[:] = json.loads(sys.argv[1])
from app.runner.clip_process import main
main()
"""
# Time limit for a call. A batch takes milliseconds, but the start and a call can take minutes on a busy CPU.
CALL_SECONDS = 300.0
_PR_SET_PDEATHSIG = 1  # prctl(2): the signal that the kernel sends to this process when its parent ends


class ProcessEndedError(RuntimeError):
    """The child process ended before it sent its answer."""

    def __init__(self) -> None:
        super().__init__("the CLIP process has ended")


class ClipProcess:
    """Sends prompts and images to the child process. Calls must not overlap, but `close` may be called at any time.

    A process that has ended starts again with the next call.
    """

    def __init__(self, name: str = EMBEDDED_NAME, sha256: str = "") -> None:
        """`name` is the name of a CLIP model, as in model.clip.Clip. `sha256` is the digest of its weights.

        Both may be set after `start`, but before other calls.
        """
        self.name, self.sha256 = name, sha256
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[object, object] | None = None
        self._lock = threading.Lock()  # protects the start and the end of the process
        self._is_ready = False  # True after the process has loaded its model
        self._is_closed = False

    def start(self) -> None:
        """Starts the process if it does not run, without waiting. It imports its packages, but loads no model."""
        self._connected()

    def wait_until_ready(self) -> "Connection[object, object]":
        """Starts the process if it does not run, and waits until it has loaded its model. Raises errors as `call`."""
        connection = self._connected()
        if not self._is_ready:
            self._receive(connection, (self.name, self.sha256))
            self._is_ready = True
        return connection

    def call(self, batch: Sequence[str] | Sequence[Pixels]) -> Embeddings:
        """Returns the embeddings (N, E) of prompts or of images of one shape.

        If the process ends during the call, a new one computes the batch again. Raises ProcessEndedError if that ends
        too, because the batch is then probably the reason. Raises the exception of the computation, and RuntimeError if
        the process does not answer within CALL_SECONDS.
        """
        try:
            result = self._receive(self.wait_until_ready(), batch)
        except ProcessEndedError:
            connection = self.wait_until_ready()
            log.warning("CLIP process ended during a call, repeating the call in a new process")
            result = self._receive(connection, batch)
        if isinstance(result, Exception):
            raise result
        assert isinstance(result, np.ndarray)
        return result

    @property
    def pid(self) -> int | None:
        """The id of the process, or None if it does not run."""
        return self._process.pid if self._process else None

    def close(self) -> None:
        """Ends the process. A call that is in progress and all later ones raise RuntimeError. Does not block."""
        with self._lock:
            self._is_closed = True
            if self._process:
                self._process.kill()
                # Without a wait, the process would remain as a zombie. Its end can take long on a busy CPU.
                threading.Thread(target=self._process.wait, daemon=True).start()

    def _receive(self, connection: "Connection[object, object]", *messages: object) -> object:
        """Sends messages to the process and returns its next message."""
        try:
            for message in messages:
                connection.send(message)
            if not connection.poll(CALL_SECONDS):
                raise TimeoutError
            return connection.recv()
        except TimeoutError as error:
            self._end()
            raise RuntimeError(f"the CLIP process gave no result within {CALL_SECONDS:.0f} s") from error
        except (EOFError, OSError) as error:
            self._end()
            raise ProcessEndedError from error

    def _connected(self) -> "Connection[object, object]":
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the CLIP process is closed")
            if self._process and self._process.poll() is not None:  # It has ended since the last call.
                self._discard()
            if not self._process or not self._connection:
                self._connection, own = Pipe()
                self._is_ready = False
                path = [entry or str(Path.cwd()) for entry in sys.path]
                arguments = [json.dumps(path), str(own.fileno())]
                command = [sys.executable, "-I", "-c", _PROGRAM, *arguments]
                with own:
                    self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(own.fileno(),))
            return self._connection

    def _end(self) -> None:
        with self._lock:
            self._discard()

    def _discard(self) -> None:
        """Ends the process, if there is one. The lock must be held."""
        if self._process and self._connection:
            self._connection.close()
            self._process.kill()
            self._process.wait()
            self._process = self._connection = None


def main() -> None:
    """Runs in the child: receives the name and the digest of a model, loads it, and sends None.

    Then answers each batch with its embeddings or with an exception. Ends if the parent ends.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(1)  # an embedding then has the same bits on every machine with the same kind of CPU
    with suppress(ClipNotInstalledError):
        import_open_clip()  # This takes seconds. Meanwhile the parent loads its model.
    connection: Connection[Any, Any] = Connection(int(sys.argv[2]))
    with suppress(EOFError, BrokenPipeError):
        name, sha256 = connection.recv()
        clip = Clip(name)
        if clip.sha256 != sha256:
            sys.exit(f"The CLIP model {name!r} has changed since the start of the service. Start the service again")
        _use_idle_cores()  # Not earlier: with the lowest priority, loading takes minutes on a busy CPU.
        connection.send(None)
        while True:
            batch = connection.recv()
            try:
                connection.send(embed(clip, batch))
            except Exception as error:
                connection.send(RuntimeError(f"{type(error).__name__}: {error}"))


def _use_idle_cores() -> None:
    """Gives this process the lowest priority: the policy SCHED_IDLE on Linux, the nice value 19 on other platforms."""
    os.nice(19)
    with suppress(AttributeError, OSError):  # only Linux has it, and a container may forbid the call
        for thread in Path("/proc/self/task").iterdir():
            os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))


@torch.inference_mode()
def embed(clip: Clip, batch: Sequence[str] | Sequence[Pixels]) -> Embeddings:
    """Returns the embeddings (N, E) of prompts, or of grey images (H, W) or colour images (H, W, C) of one shape."""
    if isinstance(batch[0], str):
        embeddings = clip.embed_prompts(batch)  # type: ignore[arg-type] # all are prompts
    else:
        layout = "n h w -> n 1 h w" if batch[0].ndim == 2 else "n h w c -> n c h w"
        pixels = rearrange(torch.from_numpy(np.stack(batch)), layout).to(clip.device)
        embeddings = clip.embed_images(from_pixels(pixels))
    array: Embeddings = embeddings.cpu().numpy()
    return array
