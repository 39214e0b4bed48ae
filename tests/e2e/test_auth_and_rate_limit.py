"""API keys, rate limits and trusted proxies, configured by environment variables."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.conftest import Start, start_service
from tests.e2e.process import Process, wait_until
from tests.e2e.service import Service, assert_problem
from tests.redis_server import RedisServer, redis_server

__all__ = ["redis_server"]

CHEAP = {"digit": 7, "num_steps": 1, "seed": 1}
KEY, OTHER = "a-key-of-some-length", "another-key"


@pytest.fixture(scope="module")
def protected(checkpoint: Path) -> Iterator[Service]:
    """A service with two keys, a rate limit and a trusted proxy on localhost."""
    with ExitStack() as stack:
        yield start_service(
            stack,
            checkpoint,
            UNFOG_API_KEYS=f"{KEY}, {OTHER}",
            UNFOG_RATE_LIMIT="3/hour",
            UNFOG_TRUSTED_PROXIES="127.0.0.1",
            UNFOG_LOG_LEVEL="debug",
        )


def test_generate_requires_a_key_and_probes_do_not(protected: Service) -> None:
    problem = assert_problem(protected.post(CHEAP), 401, "unauthorized")
    assert "X-API-Key" in problem["detail"]
    assert_problem(protected.post(CHEAP, **{"x-api-key": "wrong"}), 403, "forbidden")
    assert_problem(protected.post(CHEAP, authorization="Bearer tried-in-vain"), 403, "forbidden")
    assert protected.post(CHEAP, authorization=f"Bearer {KEY}").status_code == 200
    for path in ("/health", "/livez", "/readyz", "/startupz", "/metrics"):
        assert protected.client.get(path).status_code == 200
    wait_until(lambda: any("/metrics" in line for line in protected.process.lines), "the last request is logged")
    for secret in (KEY, OTHER, "tried-in-vain"):
        assert secret not in "".join(protected.process.lines)


def test_rate_limit_counts_by_forwarded_address_behind_a_trusted_proxy(protected: Service) -> None:
    def ask(address: str) -> int:
        return protected.post(CHEAP, **{"x-forwarded-for": address}).status_code

    assert [ask("192.0.2.1") for _ in range(4)] == [401, 401, 401, 429]
    assert ask("192.0.2.2") == 401
    # One IPv6 /64 network counts as one caller.
    assert [ask(f"2001:db8::{number}") for number in range(4)] == [401, 401, 401, 429]
    limited = protected.post(CHEAP, **{"x-forwarded-for": "192.0.2.1"})
    assert_problem(limited, 429, "rate_limited")
    wait_until(
        lambda: any('"client": "192.0.2.1"' in line for line in protected.process.lines),
        "the log contains the client address",
    )


def ask(service: Service, forwarded_for: str, key: str = "wrong") -> int:
    """Returns the status of a request that a proxy forwards with this X-Forwarded-For value."""
    return service.post(CHEAP, **{"x-forwarded-for": forwarded_for, "x-api-key": key}).status_code


def test_forwarded_text_does_not_use_up_the_rate_limit_of_a_key(start: Start) -> None:
    service = start(UNFOG_API_KEYS=f"{KEY},{OTHER}", UNFOG_RATE_LIMIT="3/hour", UNFOG_TRUSTED_PROXIES="127.0.0.1")
    for name in ("key 2", "key:2", "address:key:2"):
        assert [ask(service, name) for _ in range(4)][-1] == 429
        assert ask(service, name, OTHER) == 200


@pytest.mark.parametrize(
    "forwarded",
    ["198.51.100.1:{}", "[2001:db8:7::1]:{}", "[2001:db8:8::1%{}]:80", "not-an-address-{}"],
    ids=["port", "port-of-ipv6", "zone", "text"],
)
def test_forwarded_ports_zones_and_text_do_not_create_new_callers(protected: Service, forwarded: str) -> None:
    assert [ask(protected, forwarded.format(number)) for number in range(5)] == [403, 403, 403, 429, 429]


def test_forwarded_text_is_not_written_to_the_log(protected: Service) -> None:
    long = "x" * 5000
    ask(protected, long)
    headers = {"x-forwarded-for": f"198.51.100.9, {long}", "x-request-id": "long-address"}
    protected.client.get("/nowhere", headers=headers)
    wait_until(lambda: any("long-address" in line for line in protected.process.lines), "the request is logged")
    (line,) = [json.loads(line) for line in protected.process.lines if "long-address" in line]
    assert line["client"] == "unknown"
    assert not [line for line in protected.process.lines if long in line]


def test_forwarded_address_of_an_untrusted_client_is_ignored(start: Start) -> None:
    service = start(UNFOG_RATE_LIMIT="2/hour")
    statuses = [service.post(CHEAP, **{"x-forwarded-for": f"192.0.2.{i}"}).status_code for i in range(3)]
    assert statuses == [200, 200, 429]
    assert service.metrics().value("rejected_total", reason="rate_limited") == 1


def test_services_with_the_same_redis_share_the_rate_limit(start: Start, redis_server: RedisServer) -> None:
    variables = {"UNFOG_RATE_LIMIT": "3/hour", "UNFOG_RATE_LIMIT_URL": redis_server.url}
    services = [start(**variables) for _ in range(2)]
    statuses = [services[number % 2].post(CHEAP).status_code for number in range(5)]
    assert statuses == [200, 200, 200, 429, 429]
    redis_server.kill()
    assert [service.post(CHEAP).status_code for service in services for _ in range(4)] == [200, 200, 200, 429] * 2
    for service in services:
        assert sum("Redis does not answer" in line for line in service.process.lines) == 1
        assert service.stop() == 0


def test_invalid_api_key_stops_the_start_and_is_not_printed() -> None:
    process = Process(UNFOG_API_KEYS="a key with spaces")
    try:
        assert process.wait() == 2
        assert "UNFOG_API_KEYS is invalid" in process.lines[-1]
        assert "a key with" not in "\n".join(process.lines)
    finally:
        process.kill()
