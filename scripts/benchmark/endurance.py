"""Endurance test: mixed load for an hour, with checks of memory, file descriptors, threads and one request's image."""

import asyncio
import json
import random
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from model.files import write_json
from model.spec import SAMPLERS
from scripts.benchmark.clients import TIMEOUT
from scripts.benchmark.http_client import HttpClient
from scripts.benchmark.machine import this_machine
from scripts.benchmark.services import Running, started, this_service
from scripts.common.errors import ScriptError
from scripts.common.progress import Reporter, require

CLIENTS = 8
SAMPLE_SECONDS = 15.0  # time between two checks of the resources and of the image
FORMATS = ("application/json", "image/png", "application/zip", "text/event-stream")
LEAVES_EARLY, IS_WRONG = 0.1, 0.05  # fractions of requests: client disconnects, body is invalid
EXPECTED_STATUSES = (0, 200, 422, 429)  # 0: the client disconnected
HOSTILE_CLIENTS = 2
REST_SECONDS = 15.0  # wait after the load, so that the service can close idle connections
LONG_MINUTES = 30  # growth is only checked in runs of at least this length
MOST_GROWTH = {"megabytes": 60.0, "descriptors": 6.0, "threads": 2.0}  # limits of the growth per hour
# In a run of two hours, the second half begins after an hour. By then, memory must be constant.
TWO_HOURS, MOST_MEGABYTES_LATER = 120, 5.0
MOST_LEFT = 4  # permitted number of additional descriptors after the load; libraries keep a few files open
STAYS_SECONDS = 12.0  # the longest time that a hostile client keeps a connection open

_BODY = json.dumps({"digit": 7, "count": 16, "num_steps": 20, "scale": 8}).encode()
_HEAD = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n" % len(_BODY)
_STREAM = b"Accept: text/event-stream\r\n\r\n"
BEHAVIOURS = {  # hostile clients: the bytes that they send, and what they do next
    "sends nothing": (b"", "stays"),
    "stops in the headers": (_HEAD[:40], "stays"),
    "stops in the body": (_HEAD + b"\r\n" + _BODY[:5], "stays"),
    "does not read its answers": ((_HEAD + b"\r\n" + _BODY) * 20, "stays"),
    "does not read its event stream": (_HEAD + _STREAM + _BODY, "stays"),
    "closes its side": (_HEAD + b"\r\n" + _BODY, "closes its side"),
    "resets": (_HEAD + b"\r\n" + _BODY, "resets"),
    "sends more and resets": (_HEAD + b"\r\n" + _BODY + b"\r\n", "resets"),
    "does not send HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", "stays"),
    "sends deeply nested JSON": (_HEAD.replace(b"%d" % len(_BODY), b"16000") + b"\r\n" + b"[" * 16_000, "stays"),
}
PROBE = {"digit": 3, "seed": 11, "num_steps": 10, "sampler": "dpmpp"}


class ResourceSample(NamedTuple):
    """The resources of a service at one time."""

    at: float  # seconds since the load began
    megabytes: float  # without the pages of files
    descriptors: float
    threads: float

    @classmethod
    def of(cls, running: Running, at: float) -> "ResourceSample":
        """Returns the resources that the service uses now, `at` seconds after the load began."""
        found = running.resources()
        return cls(at, found.anonymous_megabytes, found.descriptors, found.threads)


@dataclass(slots=True)
class Log:
    """The observations of a run."""

    before: ResourceSample
    samples: list[ResourceSample] = field(default_factory=list)
    pictures: set[bytes] = field(default_factory=set)  # different answers to PROBE
    answers: dict[int, int] = field(default_factory=dict)  # status -> number of answers; 0: the client disconnected
    after: ResourceSample | None = None

    def count(self, status: int) -> None:
        """Counts an answer with this status."""
        self.answers[status] = self.answers.get(status, 0) + 1

    def as_json(self) -> dict[str, Any]:
        """Returns the results. Growth is measured in the second half, when the caches are full."""
        later = self.samples[len(self.samples) // 2 :]
        return {
            "answers": {str(status): count for status, count in sorted(self.answers.items())},
            "pictures": len(self.pictures),
            "before": self.before._asdict(),
            "after": self.after and self.after._asdict(),
            **{name: [round(getattr(sample, name), 1) for sample in self.samples] for name in MOST_GROWTH},
            **{
                f"{name}_an_hour": growth([(sample.at, getattr(sample, name)) for sample in later])
                for name in MOST_GROWTH
            },
        }


def measure_endurance(minutes: float, out: Path, reporter: Reporter) -> None:
    """Starts the service, loads it for `minutes`, writes the results and prints a summary.

    Raises ScriptError if a status was unexpected, if an image changed, or if memory, file descriptors or threads grew.
    """
    with started(this_service()) as running:
        log = asyncio.run(endure(running, 60 * minutes, reporter))
    found = {"machine": this_machine().as_json(), "minutes": minutes, **log.as_json()}
    write_json(out, found)
    answers = ", ".join(f"{count} x {status or 'disconnected'}" for status, count in sorted(log.answers.items()))
    grown = ", ".join(f"{found[f'{name}_an_hour']:.2f} {name}" for name in MOST_GROWTH)
    reporter.line(f"Answers by status: {answers}. Growth per hour in the second half: {grown}")
    if problem := problem_in(found):
        raise ScriptError(problem)


def problem_in(found: dict[str, Any]) -> str | None:
    """Returns a message about a problem in these results, or None if there is none."""
    if unexpected := sorted(found["answers"].keys() - {str(status) for status in EXPECTED_STATUSES}):
        return f"Answers with unexpected status under load: {', '.join(unexpected)}"
    if found["pictures"] != 1:
        return f"The same request gave {found['pictures']} different images, expected 1"
    before, after = found["before"]["descriptors"], found["after"]["descriptors"]
    if after > before + MOST_LEFT:
        return f"Descriptors were left open: {after:.0f} after the load, {before:.0f} before it"
    limits = MOST_GROWTH | ({"megabytes": MOST_MEGABYTES_LATER} if found["minutes"] >= TWO_HOURS else {})
    rates = {name: found[f"{name}_an_hour"] for name in limits}
    grown = [
        f"{name} grew by {rates[name]:.1f} per hour (limit {most:g})"
        for name, most in limits.items()
        if rates[name] > most
    ]
    if grown and found["minutes"] >= LONG_MINUTES:
        return "Possible leak: " + ", ".join(grown)
    return None


def growth(samples: Sequence[tuple[float, float]]) -> float:
    """Returns the Theil-Sen slope of samples (seconds, amount), per hour. Returns NaN for fewer than two samples."""
    if len(samples) < 2:
        return float("nan")
    seconds, amounts = zip(*samples, strict=True)
    return 3600 * float(require("scipy.stats", extra="bench").theilslopes(amounts, seconds).slope)


async def endure(running: Running, seconds: float, reporter: Reporter, *, seed: int = 0) -> Log:
    """Loads the service for `seconds` with clients that send requests, disconnect and make mistakes at random.

    Raises ScriptError if an answer is missing.
    """
    log = Log(ResourceSample.of(running, 0.0))
    try:
        await _endure(running, seconds, reporter, seed, log)
    except ExceptionGroup as group:  # a client failed, so the task group cancelled the others
        raise ScriptError(f"A client failed under load: {group.exceptions[0]!r}") from group
    await asyncio.sleep(REST_SECONDS)
    log.after = ResourceSample.of(running, seconds + REST_SECONDS)
    return log


async def _endure(running: Running, seconds: float, reporter: Reporter, seed: int, log: Log) -> None:
    end = time.monotonic() + seconds
    async with HttpClient(running.url) as http:
        with reporter.task("under load", round(seconds), "s") as task:
            async with asyncio.TaskGroup() as group:
                for client in range(CLIENTS):
                    group.create_task(_client(http, random.Random(f"{seed}-{client}"), end, log))
                for client in range(HOSTILE_CLIENTS):
                    group.create_task(_hostile(running.url, random.Random(f"{seed}-rude-{client}"), end))
                start = time.monotonic()
                while (now := time.monotonic()) < end:
                    async with asyncio.timeout(TIMEOUT):
                        response = await http.request("POST", "/generate", PROBE, FORMATS[1])
                    if response.status == 200:  # 429 if the other clients fill the queue
                        log.pictures.add(response.content)
                    log.samples.append(ResourceSample.of(running, now - start))
                    task.advance(round(min(SAMPLE_SECONDS, end - now)), f"{log.samples[-1].megabytes:.0f} MB")
                    await asyncio.sleep(min(SAMPLE_SECONDS, max(0.0, end - time.monotonic())))


async def _client(http: HttpClient, choose: random.Random, end: float, log: Log) -> None:
    while time.monotonic() < end:
        body: dict[str, Any] = {
            "digit": choose.randrange(10),
            "count": choose.choice([1, 1, 1, 2, 4, 16, 64]),
            "num_steps": choose.choice([1, 5, 10, 20, 50]),
            "sampler": choose.choice(SAMPLERS),
            "guidance_scale": choose.choice([1, 1, 1.5, 3]),
        }
        if choose.random() < IS_WRONG:
            body["digit"] = 10
        patience = choose.uniform(0.0, 0.5) if choose.random() < LEAVES_EARLY else None
        try:
            async with asyncio.timeout(TIMEOUT if patience is None else patience):
                response = await http.request("POST", "/generate", body, choose.choice(FORMATS))
            log.count(response.status)
        except TimeoutError:
            if patience is None:
                raise ScriptError(f"A request was not answered within {TIMEOUT} s") from None
            log.count(0)


async def _hostile(url: str, choose: random.Random, end: float) -> None:
    """Opens connections with random BEHAVIOURS until `end`. Ignores connection errors."""
    host, port = urlsplit(url).hostname or "", urlsplit(url).port or 80
    while time.monotonic() < end:
        sends, then = BEHAVIOURS[choose.choice(list(BEHAVIOURS))]
        with suppress(OSError, TimeoutError):
            await _behave(host, port, sends, then, min(STAYS_SECONDS, max(0.0, end - time.monotonic())))


async def _behave(host: str, port: int, sends: bytes, then: str, seconds: float) -> None:
    """Opens a connection, sends bytes, then performs the action `then` for at most `seconds`.

    Uses a socket, since asyncio's streams would read the answer.
    """
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setblocking(False)
        await loop.sock_connect(client, (host, port))
        async with asyncio.timeout(seconds):
            await loop.sock_sendall(client, sends)
            if then == "stays":
                await asyncio.sleep(seconds)
            elif then == "closes its side":
                client.shutdown(socket.SHUT_WR)
                while await loop.sock_recv(client, 65536):
                    pass
            else:  # closing with a linger of 0 seconds sends a reset
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
