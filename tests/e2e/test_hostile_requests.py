"""Hostile requests mixed with valid ones: all valid requests succeed and no resource leaks."""

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

from tests.e2e.concurrent_clients import send_all
from tests.e2e.conftest import start_service
from tests.e2e.hostile_requests import BOMBS, EXPENSIVE, MAX_BODY_BYTES, MEGABYTE, make, post
from tests.e2e.process import TIMEOUT, wait_until
from tests.e2e.service import INTERNAL_DETAILS, Service, assert_problem

VALID = {"digit": 7, "seed": 3, "num_steps": 2}
CONCURRENCY = 32
SILENCE = 0.25  # seconds
VALID_EVERY = 10  # every tenth request is valid
ALWAYS_ANSWERED = (  # kinds with correct framing, which always get a response
    "random bytes in a body",
    "a broken document",
    "a wrong field",
    "a JSON bomb",
    "an expensive request",
    "gzip",
)


SizedFactory = Callable[[int], bytes]  # makes a request or a body of about the given size


@pytest.fixture(scope="module")
def target(checkpoint: Path) -> Iterator[Service]:
    """A separate service with a short read timeout."""
    with ExitStack() as stack:
        yield start_service(
            stack, checkpoint, UNFOG_MAX_BATCH="64", UNFOG_REQUEST_TIMEOUT="300", UNFOG_READ_TIMEOUT="1"
        )


async def send(address: tuple[str, int], request: bytes, wait: float) -> bytes:
    """Sends bytes and returns what the server sends until it closes or is silent. Waits `wait` seconds for an answer.

    After an answer, the server may keep the connection open, so it is only read until it is silent for SILENCE seconds.
    """
    response = b""
    with suppress(ConnectionError, TimeoutError):
        reader, writer = await asyncio.open_connection(*address)
        with suppress(ConnectionError, TimeoutError):
            writer.write(request)
            while piece := await asyncio.wait_for(reader.read(65536), SILENCE if response else wait):
                response += piece
        writer.close()
    return response


async def generate(service: Service) -> list[bytes]:
    """Sends the valid request and returns its images."""
    reader, writer = await asyncio.open_connection(*service.address)
    writer.write(post(json.dumps(VALID).encode(), b"Connection: close"))
    head, _, body = (await asyncio.wait_for(reader.read(), 2 * TIMEOUT)).partition(b"\r\n\r\n")
    writer.close()
    assert head.startswith(b"HTTP/1.1 200"), head
    return [base64.b64decode(image["png"]) for image in json.loads(body)["images"]]


async def attack(service: Service, seeds: range, expected: list[bytes]) -> Counter[str]:
    """Sends the requests of all seeds, CONCURRENCY at a time. Counts them by kind and status."""
    found: Counter[str] = Counter()
    slots = asyncio.Semaphore(CONCURRENCY)

    async def one(seed: int) -> None:
        async with slots:
            if seed % VALID_EVERY == 0:
                assert await generate(service) == expected
                found["valid"] += 1
                return
            kind, request = make(seed)
            always_answered = kind in ALWAYS_ANSWERED
            response = await send(service.address, request, TIMEOUT if always_answered else SILENCE)
            status = response[9:12].decode("ascii", "replace") if response else "none"
            assert status != "none" or not always_answered, (seed, kind)
            found[f"{kind}: {status}"] += 1
            assert status[0] in "1234n", (seed, kind, response[:500])
            assert status == "200" or not INTERNAL_DETAILS.search(response.decode("latin-1")), (
                seed,
                kind,
                response[:2000],
            )

    async with asyncio.TaskGroup() as group:
        for seed in seeds:
            group.create_task(one(seed))
    return found


def attack_and_check(service: Service, count: int) -> Counter[str]:
    """Sends `count` requests. Checks that every valid one succeeds and that nothing leaks."""
    process, expected = psutil.Process(service.process.pid), service.images(**VALID)
    asyncio.run(attack(service, range(100_000, 100_200), expected))  # fills caches and thread pools
    service.wait_until_idle()
    files, memory = process.num_fds(), process.memory_info().rss
    found = asyncio.run(attack(service, range(count), expected))
    service.wait_until_idle()
    wait_until(lambda: process.num_fds() <= files + 1, "all descriptors are closed")
    assert found["valid"] == count // VALID_EVERY
    assert sum(found.values()) == count
    assert process.memory_info().rss - memory < 40 * MEGABYTE
    assert not [line for line in service.process.lines if '"level": "error"' in line or "Traceback" in line]
    assert service.images(**VALID) == expected
    return found


def test_200_hostile_requests_harm_no_valid_request(target: Service) -> None:
    found = attack_and_check(target, 200)
    assert len(found) > 15  # combinations of kind and status


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_10000_hostile_requests_harm_no_valid_request(target: Service) -> None:
    found = attack_and_check(target, 10_000)
    print("\n".join(f"{count:6} {name}" for name, count in sorted(found.items())))


@pytest.fixture(scope="module")
def plain_cpu_seconds(target: Service) -> dict[int, float]:
    """Returns the CPU time for bodies that are not JSON, by their size."""
    bodies = {size: post(b"x" * size, b"Connection: close") for size in (MAX_BODY_BYTES, MEGABYTE)}
    return {size: min(cpu_seconds(target, body) for _ in range(3)) for size, body in bodies.items()}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_json_bomb_costs_no_more_cpu_time_than_a_plain_body(
    target: Service, plain_cpu_seconds: dict[int, float], bomb: SizedFactory
) -> None:
    """Compares the CPU time of the process with that for a body of the same size that is not JSON."""
    target.wait_until_idle()
    for size, statuses in ((MAX_BODY_BYTES, (400, 422)), (MEGABYTE, (413,))):
        response = target.post(bomb(size))
        assert response.status_code in statuses, response.text[:200]
        assert_problem(response, response.status_code, response.json()["code"])
        assert len(response.content) < 10_000
        request, most = post(bomb(size), b"Connection: close"), 3 * plain_cpu_seconds[size] + 0.2
        assert any(cpu_seconds(target, request) < most for _ in range(3))  # a busy machine can delay a measurement


def test_60_json_bombs_delay_health_no_longer_than_plain_bodies(target: Service) -> None:
    def slowest(body: bytes) -> float:
        results = send_all(target, [body] * 60)
        assert results.lost == 0
        assert set(results.statuses) <= {400, 422}
        return max(results.health_seconds)

    plain = slowest(b"x" * MAX_BODY_BYTES)
    for name in ("lists in a list", "objects in a list", "unclosed lists", "many fields"):
        bomb = BOMBS[name](MAX_BODY_BYTES)
        assert any(slowest(bomb) < 3 * plain + 0.5 for _ in range(3))  # a busy machine delays some


REPEATS = 20
SIZES = {"within the limits": 1024, "over the limits": 128 * 1024}


def ask(service: Service, request: bytes) -> int:
    """Sends a request on a new connection, which the server must close. Returns the status."""
    with socket.create_connection(service.address, timeout=TIMEOUT) as client:
        client.sendall(request)
        response = http.client.HTTPResponse(client)
        response.begin()
        response.read()
    assert response.getheader("Connection") == "close"
    return response.status


def cpu_seconds(service: Service, request: bytes) -> float:
    """Returns the CPU time that the process uses for REPEATS such requests."""
    process = psutil.Process(service.process.pid)
    before = sum(process.cpu_times()[:2])
    for _ in range(REPEATS):
        ask(service, request)
    return sum(process.cpu_times()[:2]) - before


@pytest.mark.parametrize("small", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("make_request", EXPENSIVE.values(), ids=EXPENSIVE)
def test_cpu_time_is_linear_in_the_size_of_a_hostile_request(
    target: Service, make_request: SizedFactory, small: int
) -> None:
    target.wait_until_idle()
    before = cpu_seconds(target, make_request(small))
    assert cpu_seconds(target, make_request(8 * small)) < 12 * before + 0.1  # CPU times have a resolution of 10 ms


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_cpu_time_is_linear_in_the_size_of_a_json_bomb(target: Service, bomb: SizedFactory) -> None:
    target.wait_until_idle()
    small, large = (post(bomb(size), b"Connection: close") for size in (MAX_BODY_BYTES // 8, MAX_BODY_BYTES))
    assert cpu_seconds(target, large) < 12 * cpu_seconds(target, small) + 0.1


def test_body_over_the_limit_is_not_parsed(target: Service) -> None:
    """A body of 64 times the limit takes at most 12 times the CPU time of a body of twice the limit."""
    make_request = EXPENSIVE["chunks of 64 bytes"]
    target.wait_until_idle()
    before = cpu_seconds(target, make_request(2 * MAX_BODY_BYTES))
    assert cpu_seconds(target, make_request(MEGABYTE)) < 12 * before + 0.1


def test_expensive_request_over_the_limits_is_rejected(target: Service) -> None:
    statuses = {name: ask(target, make_request(MEGABYTE)) for name, make_request in EXPENSIVE.items()}
    assert set(statuses.values()) <= {400, 413, 422, 431}
    assert statuses["Accept: quotes"] == statuses["headers"] == statuses["trailers"] == 431
    assert statuses["chunks of a byte"] == statuses["a chunk extension"] == 400


@pytest.mark.slow
@pytest.mark.parametrize("size", [8 * 1024, MEGABYTE])
@pytest.mark.parametrize("make_request", EXPENSIVE.values(), ids=EXPENSIVE)
def test_livez_answers_within_50_ms_during_a_hostile_request(
    target: Service, make_request: SizedFactory, size: int
) -> None:
    request = make_request(size)
    target.wait_until_idle()
    assert statistics.median(slowest_livez_during(target, request) for _ in range(5)) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("size", [MAX_BODY_BYTES, MEGABYTE])
@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_livez_answers_within_50_ms_during_a_json_bomb(target: Service, bomb: SizedFactory, size: int) -> None:
    request = post(bomb(size), b"Connection: close")
    target.wait_until_idle()
    assert statistics.median(slowest_livez_during(target, request) for _ in range(5)) < 0.05


def slowest_livez_during(service: Service, request: bytes) -> float:
    """Returns the longest /livez latency in seconds until the request is answered."""
    seconds = []
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(ask, service, request)
        while not (seconds and pending.done()):
            start = time.perf_counter()
            assert service.client.get("/livez").status_code == 200
            seconds.append(time.perf_counter() - start)
    pending.result()
    return max(seconds)
