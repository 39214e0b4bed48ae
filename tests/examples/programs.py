"""Runs the programs in examples/ as a user does. A server between them and the service can fail on purpose."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
KEY = "key-of-the-example-tests"
TIMEOUT = 120  # seconds for one program; not a performance limit
INTERPRETERS = {".py": [sys.executable, "-W", "error"], ".mjs": ["node"], ".sh": ["bash"]}
NEEDED = {".mjs": "node", ".sh": "curl"}


def run_program(path: Path, url: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs a program with the URL and the API key of a service. Skips the test if its interpreter is missing."""
    needed = NEEDED.get(path.suffix)
    if needed and not shutil.which(needed):
        pytest.skip(f"needs {needed}")
    return subprocess.run(
        [*INTERPRETERS[path.suffix], str(path), *arguments],
        cwd=cwd,
        env={**os.environ, "UNFOG_URL": url, "UNFOG_API_KEY": KEY},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


@dataclass
class Failing:
    """A server that fails for the first requests and passes the others on to a service.

    A failure is a status, which is sent with `retry_after`, or None: the service answers, but the connection is closed
    before the client gets the answer.
    """

    service: str = ""  # URL
    failures: list[int | None] = field(default_factory=list)  # of the next requests; the last one is kept if `forever`
    forever: bool = False
    retry_after: str | None = None
    paths: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)  # Idempotency-Key of each request
    answers: list[bytes] = field(default_factory=list)  # of the service
    url: str = ""


@contextmanager
def failing_server(failing: Failing) -> Iterator[Failing]:
    """Starts the server. Its URL is `failing.url`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            failing.paths.append(self.path)
            failing.keys.append(self.headers["Idempotency-Key"])
            fails = bool(failing.failures)
            status = failing.failures[0] if fails else 200
            if fails and not failing.forever:
                failing.failures.pop(0)
            if fails and status:
                headers = {} if failing.retry_after is None else {"Retry-After": failing.retry_after}
                self.answer(status, headers, b'{"code": "failed_on_purpose"}')
                return
            forwarded = {name: value for name, value in self.headers.items() if name.lower() != "host"}
            response = httpx.post(f"{failing.service}{self.path}", content=body, headers=forwarded, timeout=TIMEOUT)
            failing.answers.append(response.content)
            if status is None:
                self.close_connection = True
                return
            kept = {name: response.headers[name] for name in ("Content-Type", "X-Seed") if name in response.headers}
            self.answer(response.status_code, kept, response.content)

        def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Keeps the output of the tests clean."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        failing.url = f"http://127.0.0.1:{server.server_port}"
        yield failing
        server.shutdown()
