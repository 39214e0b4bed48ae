"""The section `http`: starts `python -m app`, and measures its start, the latency of one image, and loads."""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any

from scripts.benchmark.clients import RequestSpec, check_answers, closed_loop, connected
from scripts.benchmark.http_client import fetch
from scripts.benchmark.services import Running, free_port
from scripts.common.errors import ScriptError
from scripts.gpu.measurements.figures import RATES, READY, Figure, Options, Sizes, Target, guarded

START_SECONDS, STOP_SECONDS = 60.0, 10.0
CLOSE_SECONDS = 60.0  # time for the last answers of a load
# Seconds between attempts to connect. The log also reports that the service is ready, but only at a level at which it
# has a line for each request. Reading these lines would slow down the clients that measure.
POLL_SECONDS = 0.02
JSON = "application/json"
GUIDANCE: dict[str, dict[str, Any]] = {"guidance off": {"guidance_scale": 1}, "default guidance": {}}
OF_GPU = Sizes(10, ((64, 1), (512, 1), (16, 64)), 1.5, 4.0, 3.0)
OF_CPU = Sizes(1, ((2, 2),), 0.1, 1.0, 0.0)
ONE_IMAGE = Target(50.0)  # ms


def measure(options: Options) -> Iterator[Figure]:
    """Yields the figures over HTTP. Targets apply only on a GPU. Raises ScriptError if the service does not start."""
    with running_service(options) as running:
        is_gpu = str(json.loads(fetch(f"{running.url}/health")).get("device", "")).startswith("cuda")
        sizes = OF_GPU if is_gpu else OF_CPU
        yield Figure("process start to ready, HTTP", running.ready_seconds, "s", READY if is_gpu else None)
        yield from guarded("one image, HTTP", _one_image(running.url, sizes.num_images, is_gpu=is_gpu))
        for load in sizes.loads:
            yield from guarded(f"load, HTTP, {load[0]} x {load[1]}", _of_load(running.url, load, sizes, is_gpu=is_gpu))
        if is_gpu:
            reserved = running.metrics().values["unfog_device_memory_bytes"]
            yield Figure("reserved memory after the loads, HTTP", reserved / 2**20, "MiB")


def _one_image(url: str, num_images: int, *, is_gpu: bool) -> Iterator[Figure]:
    for name, fields in GUIDANCE.items():
        bodies = [{"digit": seed % 10, "seed": seed, **fields} for seed in range(2 * num_images)]
        seconds = statistics.median(asyncio.run(_latencies(url, bodies))[num_images:])
        yield Figure(f"one image, HTTP, {name}", seconds * 1e3, "ms", ONE_IMAGE if is_gpu else None)


def _of_load(url: str, load: tuple[int, int], sizes: Sizes, *, is_gpu: bool) -> Iterator[Figure]:
    for name, fields in GUIDANCE.items():
        text = f"{load[0]} x {load[1]}, {name}"
        target = Target(RATES[text], is_at_most=False) if is_gpu and text in RATES else None
        yield Figure(f"load, HTTP, {text}", asyncio.run(_rate(url, load, fields, sizes)), "images/s", target)


async def _latencies(url: str, bodies: list[dict[str, Any]]) -> list[float]:
    """Sends the requests one after the other. Returns the seconds from each request to its whole answer."""
    async with connected(url, JSON) as send:
        answers = [await send(RequestSpec("one", body), time.perf_counter()) for body in bodies]
    check_answers(answers, "one image")
    return [answer.latency for answer in answers]


async def _rate(url: str, load: tuple[int, int], fields: dict[str, Any], sizes: Sizes) -> float:
    """Returns the images per second of a load."""
    num_clients, count = load

    def make(number: int) -> RequestSpec:
        return RequestSpec("load", {"digit": number % 10, "seed": number, "count": count, **fields})

    clients = (make,) * num_clients
    longest = 2 * sizes.settle_seconds + sizes.pause_seconds + sizes.seconds + CLOSE_SECONDS
    async with connected(url, JSON) as send, asyncio.timeout(longest):
        if sizes.pause_seconds:
            await closed_loop(send, clients, 0.0, sizes.settle_seconds)
            await asyncio.sleep(sizes.pause_seconds)
        window = await closed_loop(send, clients, sizes.settle_seconds, sizes.seconds)
    check_answers(window.answers, "load")
    return window.images_a_second


@contextmanager
def running_service(options: Options) -> Iterator[Running]:
    """Yields a service that is ready. Stops it after the block.

    The service refuses no request and has no CLIP model. On a CPU, the step is not compiled. The other settings are the
    defaults. Raises ScriptError if the service is not ready within START_SECONDS.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    variables = {name: value for name, value in os.environ.items() if not name.upper().startswith("UNFOG_")}
    variables |= {"UNFOG_PORT": str(port), "UNFOG_DEVICE": options.device, "UNFOG_DTYPE": options.dtype}
    variables |= {"UNFOG_LOG_LEVEL": "warning", "UNFOG_CLIP": "off"}
    variables |= {"UNFOG_QUEUE_CAPACITY": "100000", "UNFOG_REQUEST_TIMEOUT": "600"}  # no request is refused
    if options.device == "cpu":
        variables["UNFOG_COMPILE"] = "off"
    if options.checkpoint:
        variables["UNFOG_CHECKPOINT"] = str(options.checkpoint)
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "app"], env=variables, stdout=subprocess.DEVNULL)
    try:
        _wait_until_ready(process, url)
        yield Running(url, process.pid, time.perf_counter() - start)
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_until_ready(process: "subprocess.Popen[bytes]", url: str) -> None:
    end = time.perf_counter() + START_SECONDS
    while time.perf_counter() < end:
        if (status := process.poll()) is not None:
            raise ScriptError(f"the service exited with status {status} before it was ready")
        try:
            fetch(f"{url}/health")
            return
        except (OSError, HTTPException):  # The service does not listen yet, or it is not ready.
            time.sleep(POLL_SECONDS)
    raise ScriptError(f"the service was not ready after {START_SECONDS:.0f} s")
