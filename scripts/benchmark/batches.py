"""Measures what a running batch costs other requests, and which throughput it has.

A client sends one request after the other, with random pauses, so that the service is idle for a part of the time. It
is measured alone and with a batch, alternately, with one process of the service. No image has guidance, so that the
work is counted in rows: one row is one image in one step.

The throughput that is left for the batch is that of a batch alone, times the share of the time in which the service
runs no step while the client is alone.
"""

import asyncio
import json
import random
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.files import write_json
from scripts.benchmark.clients import Answer, RequestMaker, RequestSpec, Send, check_answers, connected
from scripts.benchmark.http_client import fetch
from scripts.benchmark.loads import FEW, FEW_STEPS, NUM_STEPS, Load, large, many, one
from scripts.benchmark.machine import this_machine
from scripts.benchmark.measurement import ROWS, STEPS, Times, measure
from scripts.benchmark.report import percentile, with_spread
from scripts.benchmark.services import Contestant, Running, started, this_service
from scripts.common.errors import ScriptError
from scripts.common.progress import Reporter
from scripts.evaluation.tables import as_table

IMAGES_OF_A_LINE = 10
LINES = 20_000  # more than a measurement can answer
START_SECONDS = 60  # until a batch must be running
SETTLE_SECONDS = 3.0
COLUMNS = ("client", "p95 alone, s", "p95 with a batch, s", "ratio", "batch throughput / remaining throughput")


@dataclass(frozen=True, slots=True)
class Client:
    """A client that sends one request after the other, with pauses of `pause` seconds on average."""

    name: str
    make_request: RequestMaker
    num_steps: int
    pause: float


@dataclass(frozen=True, slots=True)
class Phase:
    """What happened in one phase: the latencies of the client, and rates in rows per second."""

    latencies: list[float]
    busy: float  # share of the time in which steps ran
    rows: float  # of all images
    own_rows: float  # of the client


def few(k: int) -> RequestSpec:
    """Returns the k-th request for 64 images in 10 steps."""
    return RequestSpec(f"64, {FEW}", {**many(k).body, **FEW_STEPS})


CLIENTS = (
    Client("1 image, 100 steps", one, NUM_STEPS, 0.5),
    Client(f"64 images, {FEW}", few, 10, 1.0),
)


def measure_batches(repeats: int, seconds: float, out: Path, reporter: Reporter) -> None:
    """Measures all clients alone and with a batch, writes the results and prints the table."""
    rows = list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        contestant = this_service(data_dir=folder)
        with started(contestant) as running:
            for repeat in range(repeats):
                rows.append(_measure_all(running, contestant, repeat, seconds))
                reporter.line(_summary(rows[-1]))
                write_json(out, {"machine": this_machine().as_json(), "seconds": seconds, "rows": rows})
    reporter.line(as_table(COLUMNS, table_of(rows)))
    reporter.line(f"Batch alone, compared with 2 clients of 64 images: {with_spread([each['alone'] for each in rows])}")


def table_of(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Returns a row for each client: 95th percentiles over all repeats, and the median share.

    The ratio and the share have the range of the repeats.
    """
    table = []
    for client in CLIENTS:
        found = [row["clients"][client.name] for row in rows]
        alone, with_batch = (
            percentile([latency for each in found for latency in each[name]], 0.95) for name in ("alone", "with_batch")
        )
        ratios = [_ratio(each) for each in found]
        ratio = f"{with_batch / alone:.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
        shares = with_spread([each["share"] for each in found])
        table.append([client.name, f"{alone:.3f}", f"{with_batch:.3f}", ratio, shares])
    return table


def _ratio(found: dict[str, Any]) -> float:
    """Returns the 95th percentile of a client with a batch, divided by the one without it."""
    return percentile(found["with_batch"], 0.95) / percentile(found["alone"], 0.95)


def _measure_all(running: Running, contestant: Contestant, repeat: int, seconds: float) -> dict[str, Any]:
    """Returns the figures of one repeat.

    Every second repeat has the opposite order, so that a machine that becomes slower favours neither side.
    """
    order = CLIENTS if repeat % 2 else CLIENTS[::-1]
    if repeat % 2:
        saturated = _saturated(running, contestant, repeat, seconds)
        with_batch, only = _with_batch(running, order, repeat, seconds)
        alone = _each(running, order, repeat, seconds)
    else:
        alone = _each(running, order, repeat, seconds)
        with_batch, only = _with_batch(running, order, repeat, seconds)
        saturated = _saturated(running, contestant, repeat, seconds)
    clients = {}
    for client in CLIENTS:
        quiet, busy = alone[client.name], with_batch[client.name]
        left = only.rows * (1 - quiet.busy)
        share = (busy.rows - busy.own_rows) / left
        clients[client.name] = {
            "alone": quiet.latencies,
            "with_batch": busy.latencies,
            "busy": quiet.busy,
            "share": share,
        }
    return {"repeat": repeat, "clients": clients, "alone": only.rows / saturated, "batch_rows": only.rows}


def _each(running: Running, clients: Iterable[Client], repeat: int, seconds: float) -> dict[str, Phase]:
    return {client.name: _phase(running, client, repeat, seconds) for client in clients}


def _with_batch(
    running: Running, clients: Iterable[Client], repeat: int, seconds: float
) -> tuple[dict[str, Phase], Phase]:
    """Returns the phase of each client while a batch runs, and that of the batch alone."""
    with _batch(running):
        return _each(running, clients, repeat, seconds), _phase(running, None, repeat, seconds)


def _saturated(running: Running, contestant: Contestant, repeat: int, seconds: float) -> float:
    """Returns the rows per second of two clients with requests for 64 images."""
    two = Load("2 x 64 images", (*large().clients, *large().clients))
    before, start = running.metrics().values[f"{ROWS}_sum"], time.perf_counter()
    measure(running, contestant, two, Times(seconds, 0.0, 60.0), repeat)
    return (running.metrics().values[f"{ROWS}_sum"] - before) / (time.perf_counter() - start)


def _phase(running: Running, client: Client | None, repeat: int, seconds: float) -> Phase:
    """Measures for a number of seconds. Without a client, only a batch runs."""
    time.sleep(SETTLE_SECONDS)
    before, start = running.metrics().values, time.perf_counter()
    answers = list[Answer]()
    if client:
        answers = asyncio.run(_send(running, client, repeat, seconds))
        check_answers(answers, client.name)
    else:
        time.sleep(seconds)
    after, took = running.metrics().values, time.perf_counter() - start
    own = sum(answer.images for answer in answers) * (client.num_steps if client else 0)
    return Phase(
        [answer.latency for answer in answers],
        (after[f"{STEPS}_sum"] - before[f"{STEPS}_sum"]) / took,
        (after[f"{ROWS}_sum"] - before[f"{ROWS}_sum"]) / took,
        own / took,
    )


async def _send(running: Running, client: Client, repeat: int, seconds: float) -> list[Answer]:
    """Sends requests until the time is over, and returns the answers."""
    answers, pauses = list[Answer](), random.Random(repeat)
    async with connected(running.url) as send:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            answers.append(await _ask(send, client, len(answers) + 1000 * repeat))
            await asyncio.sleep(pauses.expovariate(1 / client.pause))
    return answers


async def _ask(send: Send, client: Client, k: int) -> Answer:
    return await send(client.make_request(k), time.perf_counter())


@contextmanager
def _batch(running: Running) -> Iterator[None]:
    """Runs a batch until the block ends. Raises ScriptError if it does not start, or ends too early."""
    lines = (
        {
            "custom_id": f"{k}",
            "method": "POST",
            "url": "/generate",
            "body": {**one(k).body, "count": IMAGES_OF_A_LINE},
        }
        for k in range(LINES)
    )
    file_id = _upload(running.url, "".join(json.dumps(line) + "\n" for line in lines).encode())
    body = {"input_file_id": file_id, "endpoint": "/generate", "completion_window": "24h"}
    batch_id = json.loads(fetch(f"{running.url}/v1/batches", body))["id"]
    end = time.monotonic() + START_SECONDS
    while _state(running, batch_id)["status"] == "validating":
        if time.monotonic() > end:
            raise ScriptError(f"The batch did not start within {START_SECONDS} s")
        time.sleep(0.1)
    yield
    if (status := _state(running, batch_id)["status"]) != "in_progress":
        raise ScriptError(f"The batch ended during the measurement with the status {status}")
    fetch(f"{running.url}/v1/batches/{batch_id}/cancel", {})


def _state(running: Running, batch_id: str) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(fetch(f"{running.url}/v1/batches/{batch_id}"))
    return state


def _upload(url: str, content: bytes) -> str:
    """Uploads a file of lines, and returns its id."""
    boundary = "unfog-benchmark"
    fields = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="lines.jsonl"\r\n\r\n'
    )
    body = fields.encode() + content + f"\r\n--{boundary}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(f"{url}/v1/files", body, headers), timeout=60) as answer:
        file_id: str = json.load(answer)["id"]
    return file_id


def _summary(row: dict[str, Any]) -> str:
    found = list[str]()
    for name, each in row["clients"].items():
        found.append(f"{name}: p95 {_ratio(each):.2f}, share {each['share']:.2f}")
    return f"{row['repeat'] + 1}: {'; '.join(found)}; alone {row['alone']:.2f}"
