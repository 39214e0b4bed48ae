"""A service that is still loading its checkpoint."""

import os
import socket
from pathlib import Path

import httpx

from tests.e2e.process import TIMEOUT, Process, wait_until


class LoadingProcess:
    """A process that reads its checkpoint from a named pipe. Loading blocks until `finish_loading` writes the bytes."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        self._checkpoint, self._pipe = checkpoint, folder / "checkpoint"
        os.mkfifo(self._pipe)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.process = Process(is_forked=True, UNFOG_CHECKPOINT=str(self._pipe), UNFOG_PORT=str(port))
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT)
        self._writer = -1
        wait_until(self._is_read, "the process has opened its checkpoint")

    def finish_loading(self) -> None:
        """Writes the checkpoint to the pipe. Replaces the pipe with a link, so that later reads open the file."""
        self._pipe.unlink()
        self._pipe.symlink_to(self._checkpoint)
        with os.fdopen(self._writer, "wb") as file:
            os.set_blocking(self._writer, True)
            file.write(self._checkpoint.read_bytes())

    def close(self) -> None:
        """Closes the client and kills the process."""
        self.client.close()
        self.process.kill()

    def _is_read(self) -> bool:
        try:
            self._writer = os.open(self._pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            return False
        return True
