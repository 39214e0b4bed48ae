"""Thousands of requests that nobody means well with, among good ones: all good ones are answered, nothing stays."""

import asyncio
import base64
import http.client
import json
import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import start_service
from tests.e2e.crowd import rush
from tests.e2e.hostile import BOMBS, FLOODS, MAX_BODY_BYTES, MEGABYTE, make, post
from tests.e2e.process import PATIENCE, eventually
from tests.e2e.service import INSIDE, Service, assert_problem

GOOD = {"digit": 7, "seed": 3, "num_steps": 2}
AT_ONCE = 32
EVERY = 10  # requests there is a good one
WHOLE = (
    "noise in a body",
    "a broken document",
    "a wrong field",
    "a bomb",
    "a flood",
    "gzip",
)  # what is framed well is answered


Maker = Callable[[int], bytes]  # of a request or a body, from its size


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
def test_a_bomb_is_refused_cheaply(target: Service, bomb: Maker) -> None:
    """Compared with a body of the same size that is plainly no JSON, in the process' own time."""
    target.wait_until_idle()
    for size, statuses in ((MAX_BODY_BYTES, (400, 422)), (MEGABYTE, (413,))):
        answer = target.post(bomb(size))
        assert answer.status_code in statuses, answer.text[:200]
        assert_problem(answer, answer.status_code, answer.json()["code"])
        assert len(answer.content) < 10_000
        plain = cpu_seconds(target, post(b"x" * size, b"Connection: close"))
        assert cpu_seconds(target, post(bomb(size), b"Connection: close")) < 3 * plain + 0.2


def test_bombs_by_the_dozen_hold_up_health_no_longer_than_plain_bodies_do(target: Service) -> None:
    def slowest(body: bytes) -> float:
        crowd = rush(target, [body] * 60)
        assert crowd.lost == 0
        assert set(crowd.statuses) <= {400, 422}
        return max(crowd.health_seconds)

    plain = slowest(b"x" * MAX_BODY_BYTES)
    for name in ("lists in a list", "objects in a list", "nested lists", "many fields"):
        bomb = BOMBS[name](MAX_BODY_BYTES)
        assert min(slowest(bomb) for _ in range(3)) < 3 * plain + 0.5  # a busy machine delays some


REPEATS = 20
SIZES = {"within the limits": 1024, "beyond them": 128 * 1024}


def ask(service: Service, request: bytes) -> int:
    """The status of the answer, on a connection of its own, which the server closes."""
    with socket.create_connection(service.address, timeout=PATIENCE) as client:
        client.sendall(request)
        answer = http.client.HTTPResponse(client)
        answer.begin()
        answer.read()
    assert answer.getheader("Connection") == "close"
    return answer.status


def cpu_seconds(service: Service, request: bytes) -> float:
    """What the process needs for some such requests."""
    process = psutil.Process(service.process.pid)
    before = sum(process.cpu_times()[:2])
    for _ in range(REPEATS):
        ask(service, request)
    return sum(process.cpu_times()[:2]) - before


@pytest.mark.parametrize("small", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
def test_cpu_time_grows_no_faster_than_a_hostile_request(target: Service, flood: Maker, small: int) -> None:
    target.wait_until_idle()
    before = cpu_seconds(target, flood(small))
    assert cpu_seconds(target, flood(8 * small)) < 12 * before + 0.1  # the clock ticks every 10 ms


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_cpu_time_grows_no_faster_than_a_hostile_body(target: Service, bomb: Maker) -> None:
    target.wait_until_idle()
    small, large = (post(bomb(size), b"Connection: close") for size in (MAX_BODY_BYTES // 8, MAX_BODY_BYTES))
    assert cpu_seconds(target, large) < 12 * cpu_seconds(target, small) + 0.1


def test_body_is_not_parsed_beyond_the_limit(target: Service) -> None:
    """A body of 64 times the limit takes at most 12 times the CPU time of a body of twice the limit."""
    flood = FLOODS["chunks of 64 bytes"]
    target.wait_until_idle()
    before = cpu_seconds(target, flood(2 * MAX_BODY_BYTES))
    assert cpu_seconds(target, flood(MEGABYTE)) < 12 * before + 0.1


def test_a_flood_beyond_the_limits_is_refused(target: Service) -> None:
    statuses = {name: ask(target, flood(MEGABYTE)) for name, flood in FLOODS.items()}
    assert set(statuses.values()) <= {400, 413, 422, 431}
    assert statuses["Accept: quotes"] == statuses["headers"] == statuses["trailers"] == 431
    assert statuses["chunks of a byte"] == statuses["a chunk extension"] == 400


@pytest.mark.slow
@pytest.mark.parametrize("size", [8 * 1024, MEGABYTE])
@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
def test_livez_is_quick_during_a_hostile_request(target: Service, flood: Maker, size: int) -> None:
    request = flood(size)
    target.wait_until_idle()
    assert statistics.median(slowest_livez_during(target, request) for _ in range(5)) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("size", [MAX_BODY_BYTES, MEGABYTE])
@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_livez_is_quick_during_a_hostile_body(target: Service, bomb: Maker, size: int) -> None:
    request = post(bomb(size), b"Connection: close")
    target.wait_until_idle()
    assert statistics.median(slowest_livez_during(target, request) for _ in range(5)) < 0.05


def slowest_livez_during(service: Service, request: bytes) -> float:
    """Asks again and again until the request is answered."""
    seconds = []
    with ThreadPoolExecutor(1) as pool:
        answered = pool.submit(ask, service, request)
        while not (seconds and answered.done()):
            start = time.perf_counter()
            assert service.client.get("/livez").status_code == 200
            seconds.append(time.perf_counter() - start)
    answered.result()
    return max(seconds)
