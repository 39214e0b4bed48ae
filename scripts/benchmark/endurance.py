"""Hours of load of every kind, beside which memory, descriptors, threads and a picture are looked at."""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from model.sampler import SAMPLERS
from scripts.benchmark.contestants import BenchError, Running
from scripts.benchmark.rude import rude
from scripts.common.progress import Reporter, require

if TYPE_CHECKING:
    from aiohttp import ClientSession

CLIENTS = 8
LOOK_SECONDS = 15.0  # between two looks at memory and at the picture
FORMATS = ("application/json", "image/png", "application/zip", "text/event-stream")
LEAVES_EARLY, IS_WRONG = 0.1, 0.05  # shares of the requests
RUDE_CLIENTS = 2
REST_SECONDS = 15.0  # after the load, for connections to be given up
LONG_MINUTES = 30  # in a shorter time growth says little
MOST_GROWTH = {"megabytes": 60.0, "descriptors": 6.0, "threads": 2.0}  # an hour
MOST_LEFT = 4  # descriptors more than before the load: of libraries that opened a file of theirs
PROBE = {"digit": 3, "seed": 11, "num_steps": 10, "sampler": "dpmpp"}


class Look(NamedTuple):
    """What a process holds at a moment, in seconds."""

    at: float
    megabytes: float
    descriptors: float
    threads: float

    @classmethod
    def of(cls, running: Running, at: float) -> "Look":
        """Returns what the service uses now, `at` seconds after the load began."""
        return cls(at, *astuple(running.resources()))


@dataclass(slots=True)
class Log:
    """What was seen."""

    before: Look
    looks: list[Look] = field(default_factory=list)
    pictures: set[bytes] = field(default_factory=set)
    answers: dict[int, int] = field(default_factory=dict)  # by status; 0 for a client that left
    after: Look | None = None

    def count(self, status: int) -> None:
        """One more."""
        self.answers[status] = self.answers.get(status, 0) + 1

    def as_json(self) -> dict[str, Any]:
        """With what grew in the second half, when all that is kept for good has been made."""
        later = self.looks[len(self.looks) // 2 :]
        return {
            "answers": {str(status): count for status, count in sorted(self.answers.items())},
            "pictures": len(self.pictures),
            "before": self.before._asdict(),
            "after": self.after and self.after._asdict(),
            **{name: [round(getattr(look, name), 1) for look in self.looks] for name in MOST_GROWTH},
            **{f"{name}_an_hour": growth([(look.at, getattr(look, name)) for look in later]) for name in MOST_GROWTH},
        }


def complaint(found: dict[str, Any]) -> str | None:
    """What is wrong with what was found; None where it is well."""
    if found["pictures"] != 1:
        return f"the same request gave {found['pictures']} pictures"
    if found["after"]["descriptors"] > found["before"]["descriptors"] + MOST_LEFT:
        return "descriptors were left open"
    grown = [name for name, most in MOST_GROWTH.items() if found[f"{name}_an_hour"] > most]
    if grown and found["minutes"] >= LONG_MINUTES:
        return f"{' and '.join(grown)} grew"
    return None


def growth(looks: Sequence[tuple[float, float]]) -> float:
    """Returns the growth in an hour of (seconds, amount) by the Theil-Sen estimator; NaN for fewer than two looks."""
    if len(looks) < 2:
        return float("nan")
    seconds, amounts = zip(*looks, strict=True)
    return 3600 * float(require("scipy.stats", extra="bench").theilslopes(amounts, seconds).slope)


async def endure(running: Running, seconds: float, reporter: Reporter, *, seed: int = 0) -> Log:
    """Clients ask, leave and err at random for so long; BenchError where an answer is missing, or must not be."""
    log = Log(Look.of(running, 0.0))
    try:
        await _endure(running, seconds, reporter, seed, log)
    except ExceptionGroup as group:  # a client's, whose end is everybody's
        raise BenchError(f"under load: {group.exceptions[0]!r}") from group
    unexpected = set(log.answers) - {0, 200, 422, 429}
    if unexpected:
        raise BenchError(f"answers of {sorted(unexpected)} under load")
    await asyncio.sleep(REST_SECONDS)
    log.after = Look.of(running, seconds + REST_SECONDS)
    return log


async def _endure(running: Running, seconds: float, reporter: Reporter, seed: int, log: Log) -> None:
    aiohttp, end = require("aiohttp", extra="bench"), time.monotonic() + seconds
    async with aiohttp.ClientSession(running.url, timeout=aiohttp.ClientTimeout(600)) as session:
        with reporter.task("under load", round(seconds), "s") as task:
            async with asyncio.TaskGroup() as group:
                for client in range(CLIENTS):
                    group.create_task(_client(session, random.Random(f"{seed}-{client}"), end, log))
                for client in range(RUDE_CLIENTS):
                    group.create_task(rude(running.url, random.Random(f"{seed}-rude-{client}"), end))
                start = time.monotonic()
                while (now := time.monotonic()) < end:
                    async with session.post("/generate", json=PROBE, headers={"Accept": FORMATS[1]}) as answer:
                        if answer.status == 200:  # 429 where the others fill the queue
                            log.pictures.add(await answer.read())
                    log.looks.append(Look.of(running, now - start))
                    task.advance(round(min(LOOK_SECONDS, end - now)), f"{log.looks[-1].megabytes:.0f} MB")
                    await asyncio.sleep(min(LOOK_SECONDS, max(0.0, end - time.monotonic())))


async def _client(session: "ClientSession", choose: random.Random, end: float, log: Log) -> None:
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
            async with asyncio.timeout(patience):
                async with session.post("/generate", json=body, headers={"Accept": choose.choice(FORMATS)}) as answer:
                    await answer.read()
                    log.count(answer.status)
        except TimeoutError:
            if patience is None:
                raise BenchError("an answer took longer than ten minutes") from None
            log.count(0)
