"""Starts and stops the measured services (this one and its alternatives), and reads the resources that they use."""

import io
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from scripts.benchmark.loads import UNGUIDED
from scripts.common.errors import ScriptError
from scripts.common.progress import require

START_SECONDS = 300  # some services compile first
STOP_SECONDS = 60
PROBE = {"count": 4, "seed": 5}  # the request to each service before it is measured
ONE_LEVEL = 1  # of 255: the difference that rounding may make
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Contestant:
    """A service to measure: how it is started, and what it serves."""

    name: str
    arguments: tuple[str, ...]  # of Python; {port} is replaced by the port
    variables: dict[str, str] = field(default_factory=dict)
    is_of_our_network: bool = True  # True if it draws with the shipped weights
    folder: Path | None = None  # where it is started; None: the working folder


@dataclass(frozen=True, slots=True)
class Resources:
    """The resources that all processes of a service use at one moment."""

    megabytes: float  # MiB; memory that processes share is counted once
    descriptors: int  # open files and sockets
    threads: int


@dataclass(frozen=True, slots=True)
class Metrics:
    """The samples of a scrape without labels, and its histograms without labels except their bounds."""

    values: dict[str, float] = field(default_factory=dict)  # by the name of the sample
    buckets: dict[str, dict[float, float]] = field(default_factory=dict)  # cumulative counts by name and upper bound


@dataclass(frozen=True, slots=True)
class Running:
    """A started service. `pid` is the leader of the process group of all its processes."""

    url: str
    pid: int
    ready_seconds: float

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Suspends the service until the block ends. `turn` lets it run in between."""
        os.killpg(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self.pid, signal.SIGCONT)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Lets the suspended service run until the block ends."""
        os.killpg(self.pid, signal.SIGCONT)
        try:
            yield
        finally:
            os.killpg(self.pid, signal.SIGSTOP)

    def resources(self) -> Resources:
        """Returns what the process and its descendants use now. Leaves out a process that has just ended."""
        psutil = require("psutil", extra="bench")
        megabytes, descriptors, threads = 0.0, 0, 0
        for process in _process_tree(self.pid):
            with suppress(psutil.Error):
                megabytes += process.memory_full_info().pss / 2**20
                descriptors += process.num_fds()
                threads += process.num_threads()
        return Resources(megabytes, descriptors, threads)

    def metrics(self) -> Metrics:
        """Returns the values of GET /metrics; no values if the service has no such path."""
        metrics = Metrics()
        try:
            with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError:
            return metrics
        for sample in itertools.chain.from_iterable(family.samples for family in text_string_to_metric_families(text)):
            if not sample.labels:
                metrics.values[sample.name] = sample.value
            elif set(sample.labels) == {"le"}:
                buckets = metrics.buckets.setdefault(sample.name.removesuffix("_bucket"), {})
                buckets[float(sample.labels["le"])] = sample.value
        return metrics


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
    """Returns a service of scripts.benchmark.alternatives."""
    label = " ".join([name, *options])
    arguments = ("-m", "scripts.benchmark.alternatives", name, "{port}", *options)
    return Contestant(label, arguments, is_of_our_network=not name.startswith("diffusers"))


@contextmanager
def started(contestant: Contestant) -> Iterator[Running]:
    """Runs the service until the block ends. Raises ScriptError if it does not answer within START_SECONDS."""
    port = _free_port()
    variables = {name: value.format(port=port) for name, value in contestant.variables.items()}
    command = [sys.executable, *(part.format(port=port) for part in contestant.arguments)]
    start = time.perf_counter()
    with subprocess.Popen(
        command,
        env=os.environ | variables,
        cwd=contestant.folder,
        stdout=subprocess.DEVNULL,
        process_group=0,
    ) as process:
        try:
            _wait_until_ready(process, port, contestant.name)
            yield Running(f"http://127.0.0.1:{port}", process.pid, time.perf_counter() - start)
        finally:
            _stop(process)


@contextmanager
def all_started(contestants: Sequence[Contestant]) -> Iterator[dict[str, Running]]:
    """Starts all services and yields them by name. Each is suspended, since an idle service uses the processor too.

    Raises ScriptError if a service draws other images than the first one although it has the same weights, or images
    of another size.
    """
    running, expected = dict[str, Running](), None
    with ExitStack() as stack:
        for contestant in contestants:
            one = running[contestant.name] = stack.enter_context(started(contestant))
            drawn = _picture(one)
            expected = drawn if expected is None else expected
            if drawn.shape != expected.shape or (contestant.is_of_our_network and _differ(drawn, expected)):
                raise ScriptError(f"{contestant.name} draws other pictures than {contestants[0].name}")
            stack.enter_context(one.stopped())
        yield running


def _differ(drawn: Pixels, expected: Pixels) -> bool:
    return bool(np.abs(drawn.astype(int) - expected).max() > ONE_LEVEL)


def _picture(running: Running) -> Pixels:
    """Requests a few images and returns their sheet, (H, W)."""
    body, headers = UNGUIDED | PROBE, {"Content-Type": "application/json", "Accept": "image/png"}
    asked = urllib.request.Request(f"{running.url}/generate", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(asked, timeout=600) as answer:
        return np.asarray(Image.open(io.BytesIO(answer.read())).convert("L"))


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
    raise ScriptError(f"{name} did not become ready")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Ends the process, and then the descendants that still run."""
    psutil = require("psutil", extra="bench")
    descendants = _process_tree(process.pid)[1:]
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
    for descendant in descendants:
        with suppress(psutil.NoSuchProcess):
            descendant.kill()


def _process_tree(pid: int) -> list[Any]:
    """Returns the process and its descendants as psutil.Process; an empty list if the process has ended."""
    psutil = require("psutil", extra="bench")
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
