"""A Redis server for tests, from the program that the system has installed."""

import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import RedisError

TIMEOUT = 60  # seconds for a start or a stop before the test fails


class RedisServer:
    """A server on a port of its own, which keeps nothing on disk. It can be killed and started again."""

    def __init__(self, program: str) -> None:
        self._program, self._folder = program, Path(tempfile.mkdtemp(prefix="unfog-redis-"))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._port = listener.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the server and waits until it answers."""
        options = ("--port", str(self._port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self._folder))
        self._process = subprocess.Popen(
            [self._program, *options], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + TIMEOUT
        while not self._answers():
            assert self._process.poll() is None and time.monotonic() < deadline, "Redis does not start"
            time.sleep(0.02)

    def keys(self) -> list[bytes]:
        with Redis(port=self._port) as client:
            return list(client.scan_iter())

    def pause(self) -> None:
        """Stops the process without closing its connections. `kill` ends it."""
        assert self._process
        self._process.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        """Kills the server. Its connections break, and it loses all counts."""
        if self._process:
            self._process.kill()
            self._process.wait(TIMEOUT)
            self._process = None

    def remove(self) -> None:
        self.kill()
        shutil.rmtree(self._folder)

    def _answers(self) -> bool:
        try:
            with Redis(port=self._port) as client:
                return bool(client.ping())
        except RedisError:
            return False


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """Starts an empty server. Skips the test if Redis is not installed."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("needs redis-server (Debian package redis-server)")
    server = RedisServer(program)
    try:
        server.start()
        yield server
    finally:
        server.remove()
