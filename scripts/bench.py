"""Measures the service as a user meets it: `python -m scripts.bench` starts it and prints a table.

Seconds to ready, resident memory, the time of one image, images a second under load. Over HTTP only,
on loopback; each figure is a median with its range over the repeats.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from scripts.arguments import Parser, integer
from scripts.progress import fail

READY = re.compile(rb"ready on (http://[^\s,\"]+)")
LARGEST_REQUEST = 64
BODY: dict[str, object] = {"digit": 7}  # 100 steps, as by default


class BenchError(Exception):
    """The service did not do what is to be measured; one sentence."""


@dataclass(frozen=True, slots=True)
class Running:
    """A service that was started to be measured."""

    url: str
    pid: int
    ready_seconds: float

    def draw(self, count: int, guidance_scale: float | None) -> float:
        """Seconds that one request takes."""
        guidance = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
        body = {**BODY, "count": count, **guidance}
        headers = {"Content-Type": "application/json", "Accept": "application/zip"}
        request = urllib.request.Request(f"{self.url}/generate", json.dumps(body).encode(), headers)
        start = time.perf_counter()
        with urllib.request.urlopen(request, timeout=600) as answer:
            answer.read()
        return time.perf_counter() - start

    def resident_megabytes(self) -> float:
        """Memory that the process holds now."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) / 1024


@contextmanager
def started(arguments: dict[str, str]) -> Iterator[Running]:
    """Starts the service on a free port of loopback and stops it again."""
    env = {**os.environ, "UNFOG_PORT": "0", "UNFOG_HOST": "127.0.0.1", "UNFOG_REQUEST_TIMEOUT": "600", **arguments}
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, "-m", "app"], env=env, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None, "asked for a pipe"
        url = next((found[1].decode() for line in process.stderr if (found := READY.search(line))), None)
        if url is None:
            raise BenchError("the service did not become ready: `python -m app` says why")
        ready_seconds = time.perf_counter() - start
        with ThreadPoolExecutor(1) as drain:  # a full pipe would stop the service
            drain.submit(process.stderr.read)
            try:
                yield Running(url, process.pid, ready_seconds)
            finally:
                process.send_signal(signal.SIGTERM)


def images_a_second(service: Running, clients: int, guidance_scale: float | None) -> float:
    """Closed loop: each client asks for the largest request, once."""
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(lambda _: service.draw(LARGEST_REQUEST, guidance_scale), range(clients)))
    return clients * LARGEST_REQUEST / (time.perf_counter() - start)


def measure(repeats: int, clients: int, arguments: dict[str, str]) -> dict[str, list[float]]:
    """Every figure, once a repeat; each repeat is a fresh start."""
    figures: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        figures.setdefault(name, []).append(value)

    for _ in range(repeats):
        with started(arguments) as service:
            add("seconds from start to ready", service.ready_seconds)
            add("resident memory when idle, MB", service.resident_megabytes())
            for name, scale in (("guidance off", 1.0), ("recommended guidance", None)):
                service.draw(1, scale)
                add(f"seconds for one image, {name}", service.draw(1, scale))
                add(f"images a second, {clients} x {LARGEST_REQUEST}, {name}", images_a_second(service, clients, scale))
            add("resident memory after load, MB", service.resident_megabytes())
    return figures


def table(figures: dict[str, list[float]]) -> str:
    """Markdown: median and range of each figure."""
    rows = [
        f"| {name} | {statistics.median(values):.3g} | {min(values):.3g} - {max(values):.3g} |"
        for name, values in figures.items()
    ]
    return "\n".join(["| figure | median | range |", "| --- | --- | --- |", *rows])


def main(argv: list[str] | None = None) -> None:
    """Parses the arguments, measures, prints the table."""
    parser = Parser(prog="python -m scripts.bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=integer(1, 100), default=5, help="fresh starts; default: 5")
    parser.add_argument("--clients", type=integer(1, 64), default=8, help="requests at once under load; default: 8")
    parser.add_argument("--checkpoint", type=Path, help="default: what ships")
    args = parser.parse_args(argv)
    try:
        figures = measure(args.repeats, args.clients, _settings(args))
    except (BenchError, OSError) as error:
        raise fail(f"bench: {error}") from error
    print(table(figures))


def _settings(args: argparse.Namespace) -> dict[str, str]:
    return {"UNFOG_CHECKPOINT": str(args.checkpoint)} if args.checkpoint else {}


if __name__ == "__main__":
    main()
