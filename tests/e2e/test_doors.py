"""Keys, rates and proxies, as a process is configured with them."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.conftest import Start, start_service
from tests.e2e.process import Process, eventually
from tests.e2e.service import Service, assert_problem

CHEAP = {"digit": 7, "num_steps": 1, "seed": 1}
KEY, OTHER = "a-key-of-some-length", "another-key"


@pytest.fixture(scope="module")
def guarded(checkpoint: Path) -> Iterator[Service]:
    """Two keys, a rate, and a proxy on this machine."""
    with ExitStack() as stack:
        yield start_service(
            stack,
            checkpoint,
            UNFOG_API_KEYS=f"{KEY}, {OTHER}",
            UNFOG_RATE_LIMIT="3/hour",
            UNFOG_TRUSTED_PROXIES="127.0.0.1",
            UNFOG_LOG_LEVEL="debug",
        )


def test_a_key_opens_and_health_needs_none(guarded: Service) -> None:
    problem = assert_problem(guarded.post(CHEAP), 401, "unauthorized")
    assert "X-API-Key" in problem["detail"]
    assert_problem(guarded.post(CHEAP, **{"x-api-key": "wrong"}), 403, "forbidden")
    assert_problem(guarded.post(CHEAP, authorization="Bearer tried-in-vain"), 403, "forbidden")
    assert guarded.post(CHEAP, authorization=f"Bearer {KEY}").status_code == 200
    for path in ("/health", "/livez", "/readyz", "/startupz", "/metrics"):
        assert guarded.client.get(path).status_code == 200
    eventually(lambda: any("/metrics" in line for line in guarded.process.lines), "all of it is logged")
    for secret in (KEY, OTHER, "tried-in-vain"):
        assert secret not in "".join(guarded.process.lines)


def test_a_rate_is_each_addresss_behind_a_proxy_that_is_trusted(guarded: Service) -> None:
    def ask(address: str) -> int:
        return guarded.post(CHEAP, **{"x-forwarded-for": address}).status_code

    assert [ask("192.0.2.1") for _ in range(4)] == [401, 401, 401, 429]
    assert ask("192.0.2.2") == 401
    assert [ask(f"2001:db8::{number}") for number in range(4)] == [401, 401, 401, 429]  # one customer
    limited = guarded.post(CHEAP, **{"x-forwarded-for": "192.0.2.1"})
    assert_problem(limited, 429, "rate_limited")
    eventually(lambda: any('"client": "192.0.2.1"' in line for line in guarded.process.lines), "the log names it")


def ask(service: Service, forwarded_for: str, key: str = "wrong") -> int:
    """The status of a request that a proxy forwards with this address."""
    return service.post(CHEAP, **{"x-forwarded-for": forwarded_for, "x-api-key": key}).status_code


@pytest.mark.parametrize("name", ["key 2", "key:2", "address:key:2"])
def test_forwarded_text_does_not_spend_the_rate_of_a_key(start: Start, name: str) -> None:
    service = start(UNFOG_API_KEYS=f"{KEY},{OTHER}", UNFOG_RATE_LIMIT="3/hour", UNFOG_TRUSTED_PROXIES="127.0.0.1")
    assert [ask(service, name) for _ in range(4)] == [403, 403, 403, 429]
    assert ask(service, name, OTHER) == 200


@pytest.mark.parametrize(
    "forwarded",
    ["198.51.100.1:{}", "[2001:db8:7::1]:{}", "[2001:db8:8::1%{}]:80", "not-an-address-{}"],
    ids=["port", "port-of-ipv6", "zone", "text"],
)
def test_forwarded_ports_and_text_do_not_make_new_callers(guarded: Service, forwarded: str) -> None:
    assert [ask(guarded, forwarded.format(number)) for number in range(5)] == [403, 403, 403, 429, 429]


def test_forwarded_text_is_short_in_the_log(guarded: Service) -> None:
    long = "x" * 5000
    ask(guarded, long)
    headers = {"x-forwarded-for": f"198.51.100.9, {long}", "x-request-id": "long-address"}
    guarded.client.get("/nowhere", headers=headers)
    eventually(lambda: any("long-address" in line for line in guarded.process.lines), "its line is in the log")
    (line,) = [json.loads(line) for line in guarded.process.lines if "long-address" in line]
    assert line["client"] == "unknown"
    assert not [line for line in guarded.process.lines if long in line]


def test_nobody_else_chooses_an_address(start: Start) -> None:
    service = start(UNFOG_RATE_LIMIT="2/hour")
    statuses = [service.post(CHEAP, **{"x-forwarded-for": f"192.0.2.{i}"}).status_code for i in range(3)]
    assert statuses == [200, 200, 429]
    assert service.metrics().of("rejected_total", reason="rate_limited") == 1


def test_a_key_that_no_header_can_carry_stops_the_start_and_is_not_said() -> None:
    process = Process(UNFOG_API_KEYS="a key with spaces")
    try:
        assert process.wait() == 2
        assert "UNFOG_API_KEYS is invalid" in process.lines[-1]
        assert "a key with" not in "\n".join(process.lines)
    finally:
        process.end()
