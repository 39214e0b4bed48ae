"""A PostgreSQL server for tests, from the programs that the system has installed."""

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest

TIMEOUT = 60  # seconds for a start or a stop before the test fails
READY = "database system is ready to accept connections"
# The data need not survive a failure of the machine. They survive `stop`.
FAST = ("fsync=off", "full_page_writes=off", "autovacuum=off", "max_connections=200")


class PostgreSQL:
    """A server whose data and socket are in a temporary folder. It can be stopped and started again."""

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        self._folder = Path(tempfile.mkdtemp(prefix="unfog-postgresql-", dir="/tmp"))  # short: it has the socket
        self._numbers = itertools.count(1)
        self._server: subprocess.Popen[str] | None = None
        # PostgreSQL refuses to run as root.
        self._user: dict[str, Any] = {}
        if os.geteuid() == 0:
            account = pwd.getpwnam("postgres")
            self._user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
            os.chown(self._folder, account.pw_uid, account.pw_gid)
        flags = ("-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        subprocess.run(
            [programs / "initdb", *flags, "-D", self._data],
            **self._user,
            cwd="/",
            check=True,
            capture_output=True,
            timeout=TIMEOUT,
        )

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def start(self) -> None:
        """Starts the server and waits until it accepts connections."""
        options = [f"-c{option}" for option in (*FAST, "listen_addresses=", f"unix_socket_directories={self._folder}")]
        self._server = subprocess.Popen(
            [self._programs / "postgres", "-D", self._data, *options],
            **self._user,
            cwd="/",
            env={"LC_ALL": "C", "PATH": os.environ["PATH"]},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        is_ready = threading.Event()
        threading.Thread(target=self._read, args=(self._server, is_ready), daemon=True).start()
        assert is_ready.wait(TIMEOUT), "PostgreSQL does not start"

    def stop(self) -> None:
        """Stops the server at once. Its connections break."""
        if self._server is not None:
            self._server.send_signal(signal.SIGQUIT)
            self._server.wait(TIMEOUT)
            self._server = None

    def new_schema(self) -> str:
        """Returns the URL of an empty schema, which is as good as a new database, and much faster to create."""
        name = f"test_{next(self._numbers)}"
        with psycopg.connect(self._url, autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {name}".encode())
        return f"{self._url}&options={quote(f'-csearch_path={name}')}"

    def has_idle_transactions(self) -> bool:
        """Returns True if a client does nothing within a transaction."""
        with psycopg.connect(self._url, autocommit=True) as connection:
            query = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'"
            return connection.execute(query).fetchone() != (0,)

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self._folder)

    @property
    def _url(self) -> str:
        return f"postgresql://postgres@/postgres?host={quote(str(self._folder), safe='')}"

    @staticmethod
    def _read(server: subprocess.Popen[str], is_ready: threading.Event) -> None:
        """Reads the log until the server ends, so that the server never waits for a reader."""
        assert server.stderr
        with server.stderr as log:
            for line in log:
                if READY in line:
                    is_ready.set()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """Starts a server for all tests of this process. Skips the test if PostgreSQL is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    program = str(found[-1]) if found else shutil.which("initdb")
    if program is None:
        pytest.skip("needs PostgreSQL (initdb and postgres)")
    server = PostgreSQL(Path(program).resolve().parent)
    try:
        server.start()
        yield server
    finally:
        server.remove()
