"""HAProxy in front of servers that hold each request until the test permits its answer."""

import csv
import http.client
import queue
import socket
import subprocess
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from scripts.benchmark.replicas import HAPROXY
from scripts.benchmark.services import free_port
from tests.e2e.process import wait_until

WAIT_SECONDS = 30.0


class HeldServer(ThreadingHTTPServer):
    """Answers each request when the test permits it."""

    def __init__(self, arrived: "queue.Queue[tuple[int, threading.Event]]", place: int) -> None:
        super().__init__(("127.0.0.1", 0), HeldAnswer)
        self.arrived, self.place = arrived, place


class HeldAnswer(BaseHTTPRequestHandler):
    server: HeldServer

    def do_GET(self) -> None:
        permitted = threading.Event()
        self.server.arrived.put((self.server.place, permitted))
        permitted.wait(WAIT_SECONDS)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class HeldRequest:
    """A request that waits for its answer. `place` is that of its server."""

    def __init__(self, place: int, permitted: threading.Event, client: http.client.HTTPConnection) -> None:
        self.place, self._permitted, self._client = place, permitted, client

    def end(self) -> None:
        self._permitted.set()
        assert self._client.getresponse().status == 200
        self._client.close()


class Balancer:
    """HAProxy with the configuration of the benchmark."""

    def __init__(self, num_servers: int, folder: Path, stack: ExitStack) -> None:
        self._arrived = queue.Queue[tuple[int, threading.Event]]()
        self._port, self._socket = free_port(), folder / "haproxy"
        servers = "\n".join(f"    server replica{place} {self._serve(place, stack)}" for place in range(num_servers))
        config = HAPROXY.format(port=self._port, servers=servers)
        file = folder / "haproxy.cfg"
        file.write_text(config.replace("global\n", f"global\n    stats socket {self._socket}\n"))
        process = stack.enter_context(subprocess.Popen(["haproxy", "-db", "-q", "-f", str(file)]))
        stack.callback(process.terminate)
        wait_until(self._socket.exists, "HAProxy runs")

    def send(self) -> HeldRequest:
        """Sends a request. Returns it when a server has it."""
        client = http.client.HTTPConnection("127.0.0.1", self._port, timeout=WAIT_SECONDS)
        client.request("GET", "/", headers={"Connection": "close"})
        return HeldRequest(*self._arrived.get(timeout=WAIT_SECONDS), client)

    def has_requests(self, expected: Sequence[int]) -> bool:
        """Returns True if HAProxy counts these numbers of unanswered requests of the servers."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self._socket))
            connection.sendall(b"show stat\n")
            text = connection.makefile().read()
        rows = csv.DictReader(text.removeprefix("# ").splitlines())
        found = {row["svname"]: int(row["scur"]) for row in rows}
        return [found[f"replica{place}"] for place in range(len(expected))] == list(expected)

    def _serve(self, place: int, stack: ExitStack) -> str:
        """Starts a server. Returns its address."""
        server = HeldServer(self._arrived, place)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stack.callback(server.server_close)
        stack.callback(server.shutdown)
        return f"127.0.0.1:{server.server_port}"
