"""Starts, suspends and stops the measured services, and reads their metrics and resources."""

import io
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from scripts.benchmark.http_client import fetch
from scripts.benchmark.loads import UNGUIDED
from scripts.common.errors import ScriptError
from scripts.common.progress import require

START_SECONDS = 300  # some services compile first
STOP_SECONDS = 60
PROBE = {"count": 4, "seed": 5}  # request whose images must be the same from all services
ONE_LEVEL = 1  # largest difference of pixels that rounding may cause, of 255 levels
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Contestant:
    """A service to measure, and how to start it."""

    name: str
    arguments: tuple[str, ...]  # arguments of the Python interpreter; {port} is replaced by the port
    variables: dict[str, str] = field(default_factory=dict)  # environment variables; {port} is also replaced
    is_of_our_network: bool = True  # True if it uses the shipped weights
    folder: Path | None = None  # the working folder of the service; None: that of this process
    probe: Mapping[str, Any] = field(default_factory=lambda: UNGUIDED | PROBE)  # must give the same images everywhere


@dataclass(frozen=True, slots=True)
class Resources:
    """The resources that all processes of a service use at one time."""

    megabytes: float  # MiB; shared memory is counted once
    # MiB without the pages of files, because the share of these pages changes with the other processes that use them.
    anonymous_megabytes: float
    descriptors: int  # open files and sockets
    threads: int


@dataclass(frozen=True, slots=True)
class Metrics:
    """The samples of one scrape of GET /metrics that have no labels."""

    values: dict[str, float] = field(default_factory=dict)  # name of the sample -> value
    buckets: dict[str, dict[float, float]] = field(default_factory=dict)  # name of the histogram -> `le` -> count


@dataclass(frozen=True, slots=True)
class Running:
    """A started service. `pid` is the leader of the process group with all its processes."""

    url: str
    pid: int
    ready_seconds: float

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Suspends the service until the block ends. In the block, `turn` lets it run for a while."""
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
        """Returns the resources of the process and its descendants. Ignores a process that has just ended."""
        psutil = require("psutil", extra="bench")
        megabytes, anonymous_megabytes, descriptors, threads = 0.0, 0.0, 0, 0
        for process in _process_tree(self.pid):
            with suppress(psutil.Error):
                memory = process.memory_full_info()
                megabytes += memory.pss / 2**20
                anonymous_megabytes += (memory.rss - memory.shared) / 2**20
                descriptors += process.num_fds()
                threads += process.num_threads()
        return Resources(megabytes, anonymous_megabytes, descriptors, threads)

    def metrics(self) -> Metrics:
        """Scrapes GET /metrics. The result is empty if the service does not have this route."""
        metrics = Metrics()
        try:
            text = fetch(f"{self.url}/metrics").decode()
        except urllib.error.HTTPError:
            return metrics
        for sample in itertools.chain.from_iterable(family.samples for family in text_string_to_metric_families(text)):
            if not sample.labels:
                metrics.values[sample.name] = sample.value
            elif set(sample.labels) == {"le"}:
                buckets = metrics.buckets.setdefault(sample.name.removesuffix("_bucket"), {})
                buckets[float(sample.labels["le"])] = sample.value
        return metrics


def this_service(
    name: str = "unfog", folder: Path | None = None, *, probe: Mapping[str, Any] | None = None, **variables: str
) -> Contestant:
    """Returns this project's service, or the version of it in `folder`.

    `variables` are settings without the prefix UNFOG_, for example `max_batch="8"`. `probe` is that of Contestant.
    """
    own = {
        "UNFOG_REQUEST_TIMEOUT": "600",
        "UNFOG_PORT": "{port}",
        "UNFOG_HOST": "127.0.0.1",
        "UNFOG_LOG_LEVEL": "warning",
    }
    own |= {f"UNFOG_{key.upper()}": value for key, value in variables.items()}
    return Contestant(name, ("-m", "app"), own, folder=folder, probe=probe or UNGUIDED | PROBE)


def alternative(name: str, *options: str, probe: Mapping[str, Any] | None = None) -> Contestant:
    """Returns a service of scripts.benchmark.alternatives with these command-line options."""
    label = " ".join([name, *options])
    arguments = ("-m", "scripts.benchmark.alternatives", name, "{port}", *options)
    is_of_our_network = not name.startswith("diffusers")
    return Contestant(label, arguments, is_of_our_network=is_of_our_network, probe=probe or UNGUIDED | PROBE)


@contextmanager
def started(contestant: Contestant) -> Iterator[Running]:
    """Runs the service until the block ends. Raises ScriptError if it is not ready within START_SECONDS."""
    port = free_port()
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
            _wait_until_ready(process, port, contestant)
            yield Running(f"http://127.0.0.1:{port}", process.pid, time.perf_counter() - start)
        finally:
            _stop(process)


@contextmanager
def all_started(contestants: Sequence[Contestant]) -> Iterator[dict[str, Running]]:
    """Starts all services and yields them by name. All are suspended, since an idle service uses the processor too.

    Raises ScriptError if a service generates images of another size than the first one, or different images although
    it uses the same weights.
    """
    running, expected = dict[str, Running](), None
    with ExitStack() as stack:
        for contestant in contestants:
            one = running[contestant.name] = stack.enter_context(started(contestant))
            images = _probe_sheet(one, contestant.probe)
            expected = images if expected is None else expected
            if images.shape != expected.shape or (contestant.is_of_our_network and _differ(images, expected)):
                names = f"{contestant.name} and {contestants[0].name}"
                raise ScriptError(f"{names} generate different images. They must use the same checkpoint and settings")
            stack.enter_context(one.stopped())
        yield running


def _differ(images: Pixels, expected: Pixels) -> bool:
    return bool(np.abs(images.astype(int) - expected).max() > ONE_LEVEL)


def _probe_sheet(running: Running, probe: Mapping[str, Any]) -> Pixels:
    """Sends the request `probe` and returns its contact sheet, (H, W)."""
    sheet = fetch(f"{running.url}/generate", dict(probe), "image/png", timeout=600)
    return np.asarray(Image.open(io.BytesIO(sheet)).convert("L"))


def _wait_until_ready(process: "subprocess.Popen[bytes]", port: int, contestant: Contestant) -> None:
    deadline = time.monotonic() + START_SECONDS
    body = {**contestant.probe, "num_steps": 1, "count": 1}
    while time.monotonic() < deadline and process.poll() is None:
        try:
            fetch(f"http://127.0.0.1:{port}/generate", body, timeout=START_SECONDS)
            return
        except OSError:  # the service does not listen yet, or it is not ready
            time.sleep(0.05)
    raise ScriptError(f"{contestant.name} did not become ready: it exited, or did not answer within {START_SECONDS} s")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Stops the process, then kills its descendants that still run."""
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


def free_port() -> int:
    """Returns a port of 127.0.0.1 that no process uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
