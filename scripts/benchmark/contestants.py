"""What is measured side by side: this service and the alternatives, each a process of its own on a free port."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

START_SECONDS = 300  # one of them may compile first
STOP_SECONDS = 60


class BenchError(Exception):
    """A service did not do what is to be measured; one sentence."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """A service to measure, and all that makes it what it is."""

    name: str
    arguments: tuple[str, ...]  # of Python; {port} stands for the port
    variables: dict[str, str] = field(default_factory=dict)
    is_of_our_network: bool = True  # draws with the shipped weights
    folder: Path | None = None  # that it is started in; the working folder if None


@dataclass(frozen=True, slots=True)
class Running:
    """One that was started."""

    url: str
    pid: int
    ready_seconds: float

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """It stands still until the block ends, but for its turns."""
        self._signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(signal.SIGCONT)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """It runs until the block ends."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        for pid in _family(self.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def resident_megabytes(self) -> float:
        """Memory of the process and its children now; what they share counts once."""
        return sum(_resident_kilobytes(pid) for pid in _family(self.pid)) / 1024

    def descriptors(self) -> int:
        """Open files and sockets of the process and its children."""
        return sum(_entries(pid, "fd") for pid in _family(self.pid))

    def threads(self) -> int:
        """Of the process and its children."""
        return sum(_entries(pid, "task") for pid in _family(self.pid))

    def metrics(self) -> dict[str, float]:
        """What GET /metrics says, by series; nothing where there is none."""
        try:
            with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError:
            return {}
        pairs = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
        return {series: float(value) for series, value in pairs}


def this_service(name: str = "unfog", folder: Path | None = None, **variables: str) -> Contestant:
    """Returns this project's service with these UNFOG_ variables, or the version of it in `folder`."""
    own = {
        "UNFOG_REQUEST_TIMEOUT": "600",
        "UNFOG_PORT": "{port}",
        "UNFOG_HOST": "127.0.0.1",
        "UNFOG_LOG_LEVEL": "warning",
    }
    own |= {f"UNFOG_{key.upper()}": value for key, value in variables.items()}
    return Contestant(name, ("-m", "app"), own, folder=folder)


def alternative(name: str, *options: str) -> Contestant:
    """One of scripts.benchmark.alternatives."""
    label = " ".join([name, *options])
    arguments = ("-m", "scripts.benchmark.alternatives", name, "{port}", *options)
    return Contestant(label, arguments, is_of_our_network=not name.startswith("diffusers"))


@contextmanager
def started(contestant: Contestant) -> Iterator[Running]:
    """Runs it until the block ends; BenchError where it does not answer."""
    port = _free_port()
    variables = {name: value.format(port=port) for name, value in contestant.variables.items()}
    command = [sys.executable, *(part.format(port=port) for part in contestant.arguments)]
    start = time.perf_counter()
    environment = os.environ | variables
    with subprocess.Popen(command, env=environment, cwd=contestant.folder, stdout=subprocess.DEVNULL) as process:
        try:
            _wait_until_ready(process, port, contestant.name)
            yield Running(f"http://127.0.0.1:{port}", process.pid, time.perf_counter() - start)
        finally:
            _stop(process)


def _wait_until_ready(process: "subprocess.Popen[bytes]", port: int, name: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    body, headers = b'{"digit": 1, "num_steps": 1, "guidance_scale": 1}', {"Content-Type": "application/json"}
    while time.monotonic() < deadline and process.poll() is None:
        try:
            asked = urllib.request.Request(f"http://127.0.0.1:{port}/generate", body, headers)
            with urllib.request.urlopen(asked, timeout=START_SECONDS):
                return
        except OSError:  # not listening yet, or starting
            time.sleep(0.05)
    raise BenchError(f"{name} did not become ready")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    family = {pid: _start_time(pid) for pid in _family(process.pid)[1:]}
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
    for pid, started_at in family.items():  # a worker that outlived its server
        if _start_time(pid) == started_at:
            os.kill(pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _family(pid: int) -> list[int]:
    """The process, its children, and theirs."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [pid]
    return [pid, *(member for child in children for member in _family(int(child)))]


def _start_time(pid: int) -> str | None:
    """What tells a process from a later one of the same number; None where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _entries(pid: int, folder: str) -> int:
    try:
        return len(list(Path(f"/proc/{pid}/{folder}").iterdir()))
    except OSError:
        return 0


def _resident_kilobytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
