"""A service that has not loaded its checkpoint yet."""

import os
import socket
from pathlib import Path

import httpx

from tests.e2e.process import PATIENCE, Process, eventually


class Loading:
    """A process that reads its checkpoint from a pipe, and so loads until it is given the bytes."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        self._checkpoint, self._pipe = checkpoint, folder / "checkpoint"
        os.mkfifo(self._pipe)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.process = Process(UNFOG_CHECKPOINT=str(self._pipe), UNFOG_PORT=str(port))
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE)
        self._writer = -1
        eventually(self._is_read, "the process reads its checkpoint")

    def go_on(self) -> None:
        """Gives it what it waits for; what it opens next is the file itself."""
        self._pipe.unlink()
        self._pipe.symlink_to(self._checkpoint)
        with os.fdopen(self._writer, "wb") as file:
            os.set_blocking(self._writer, True)
            file.write(self._checkpoint.read_bytes())

    def end(self) -> None:
        """Leaves nothing behind."""
        self.client.close()
        self.process.end()

    def _is_read(self) -> bool:
        try:
            self._writer = os.open(self._pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            return False
        return True
