"""Thousands of requests that nobody means well with, among good ones: all good ones are answered, nothing stays."""

import asyncio
import base64
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import start_service
from tests.e2e.crowd import rush
from tests.e2e.hostile import BOMBS, MEGABYTE, make, post
from tests.e2e.process import PATIENCE, eventually
from tests.e2e.service import INSIDE, Service, assert_problem

GOOD = {"digit": 7, "seed": 3, "num_steps": 2}
AT_ONCE = 32
EVERY = 10  # requests there is a good one
WHOLE = ("noise in a body", "a broken document", "a wrong field", "a bomb", "gzip")  # what is framed well is answered


@pytest.fixture(scope="module")
def target(checkpoint: Path) -> Iterator[Service]:
    """A service of its own, which does not wait long."""
    with ExitStack() as stack:
        yield start_service(
            stack, checkpoint, UNFOG_MAX_BATCH="64", UNFOG_REQUEST_TIMEOUT="300", UNFOG_READ_TIMEOUT="1"
        )


async def send(address: tuple[str, int], request: bytes, silence: float) -> bytes:
    """What comes back until the server closes, or so many seconds pass in silence."""
    answer = b""
    with suppress(ConnectionError, TimeoutError):
        reader, writer = await asyncio.open_connection(*address)
        with suppress(ConnectionError, TimeoutError):
            writer.write(request)
            while piece := await asyncio.wait_for(reader.read(65536), silence):
                answer += piece
        writer.close()
    return answer


async def good(service: Service) -> list[bytes]:
    """A good request among them."""
    reader, writer = await asyncio.open_connection(*service.address)
    writer.write(post(json.dumps(GOOD).encode(), b"Connection: close"))
    head, _, body = (await asyncio.wait_for(reader.read(), 2 * PATIENCE)).partition(b"\r\n\r\n")
    writer.close()
    assert head.startswith(b"HTTP/1.1 200"), head
    return [base64.b64decode(image["png"]) for image in json.loads(body)["images"]]


async def attack(service: Service, seeds: range, wanted: list[bytes]) -> Counter[str]:
    """All of them, some at once; how many there were of each kind and status."""
    found: Counter[str] = Counter()
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(seed: int) -> None:
        async with turn:
            if seed % EVERY == 0:
                assert await good(service) == wanted
                found["good"] += 1
                return
            kind, request = make(seed)
            is_whole = kind in WHOLE
            answer = await send(service.address, request, PATIENCE if is_whole else 0.25)
            status = answer[9:12].decode("ascii", "replace") if answer else "none"
            assert status != "none" or not is_whole, (seed, kind)
            found[f"{kind}: {status}"] += 1
            assert status[0] in "1234n", (seed, kind, answer[:500])
            assert status == "200" or not INSIDE.search(answer.decode("latin-1")), (seed, kind, answer[:2000])

    async with asyncio.TaskGroup() as group:
        for seed in seeds:
            group.create_task(one(seed))
    return found


def withstand(service: Service, count: int) -> Counter[str]:
    process, wanted = psutil.Process(service.process.pid), service.images(**GOOD)
    asyncio.run(attack(service, range(100_000, 100_200), wanted))  # what is kept for good is made by the first
    service.wait_until_idle()
    files, memory = process.num_fds(), process.memory_info().rss
    found = asyncio.run(attack(service, range(count), wanted))
    service.wait_until_idle()
    eventually(lambda: process.num_fds() <= files + 1, "no descriptor is left open")
    assert found["good"] == count // EVERY
    assert sum(found.values()) == count
    assert process.memory_info().rss - memory < 40 * MEGABYTE
    assert not [line for line in service.process.lines if '"level": "error"' in line or "Traceback" in line]
    assert service.images(**GOOD) == wanted
    return found


def test_hundreds_of_hostile_requests(target: Service) -> None:
    found = withstand(target, 200)
    assert len(found) > 15  # kinds and statuses


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_hostile_requests(target: Service) -> None:
    found = withstand(target, 10_000)
    print("\n".join(f"{count:6} {name}" for name, count in sorted(found.items())))


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_cheaply(target: Service, bomb: bytes) -> None:
    """Beside a body of the same size that is plainly no JSON, in the process' own time."""
    process = psutil.Process(target.process.pid)

    def seconds(body: bytes) -> float:
        before = sum(process.cpu_times()[:2])
        for _ in range(10):
            answer = target.post(body)
            assert answer.status_code in (400, 422), answer.text[:200]
            assert_problem(answer, answer.status_code, answer.json()["code"])
            assert len(answer.content) < 10_000
        return sum(process.cpu_times()[:2]) - before

    target.wait_until_idle()
    plain = seconds(b"x" * len(bomb))
    assert seconds(bomb) < 3 * plain + 0.2


def test_bombs_by_the_dozen_hold_up_health_no_longer_than_plain_bodies_do(target: Service) -> None:
    def slowest(body: bytes) -> float:
        crowd = rush(target, [body] * 60)
        assert crowd.lost == 0
        assert set(crowd.statuses) <= {400, 422}
        return max(crowd.health_seconds)

    plain = slowest(b"x" * MEGABYTE)
    bombs = max(slowest(BOMBS[name]) for name in ("lists in a list", "objects in a list", "nested lists"))
    assert bombs < 3 * plain + 0.5
