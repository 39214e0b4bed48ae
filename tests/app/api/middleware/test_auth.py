"""Tests of API keys, rate limits, the paths that are exempt, CORS and security headers."""

import hmac
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from starlette.datastructures import Headers

from app import errors
from app.api.middleware.auth import Keys
from tests.app.application import WORK, run
from tests.app.fakes import FakeRunner

KEYS = Keys([SecretStr("first-key"), SecretStr("second-key")])
EXEMPT_PATHS = (
    "/health",
    "/livez",
    "/readyz",
    "/startupz",
    "/metrics",
    "/docs",
    "/docs/swagger-ui.css",
    "/openapi.json",
    "/",
    "/static/main.js",
)
WITH_KEYS = {"api_keys": "first-key,second-key"}


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer first-key"},
        {"authorization": "bearer  second-key"},
        {"x-api-key": "first-key"},
        {"x-api-key": " second-key "},
        {"authorization": "Basic Zm9v", "x-api-key": "first-key"},  # a proxy can use the Authorization header
        {"authorization": "Bearer old", "x-api-key": "first-key"},
    ],
)
def test_every_key_is_accepted_in_both_headers(headers: dict[str, str]) -> None:
    assert KEYS.check(Headers(headers)) in (1, 2)


def test_check_returns_the_position_of_the_key() -> None:
    positions = [KEYS.check(Headers({"x-api-key": key})) for key in ("first-key", "second-key")]
    assert positions == [1, 2]
    assert KEYS.check(Headers({"authorization": "Bearer wrong", "x-api-key": "second-key"})) == 2


@pytest.mark.parametrize("headers", [{}, {"authorization": ""}, {"authorization": "Bearer"}, {"x-api-key": " "}])
def test_request_without_a_key_is_unauthorized(headers: dict[str, str]) -> None:
    with pytest.raises(errors.Unauthorized):
        KEYS.check(Headers(headers))


@pytest.mark.parametrize("key", ["first", "first-key2", "FIRST-KEY", "first-key,second-key", "ÿ", "0" * 10_000])
def test_invalid_key_is_forbidden(key: str) -> None:
    for headers in ({"x-api-key": key}, {"authorization": f"Bearer {key}"}):
        with pytest.raises(errors.Forbidden):
            KEYS.check(Headers(headers))


def test_auth_is_off_without_keys() -> None:
    assert Keys([]).check(Headers({})) is None
    assert Keys([]).check(Headers({"x-api-key": "anything"})) is None


def test_every_check_compares_all_keys_with_equal_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []
    original = hmac.compare_digest

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((len(left), len(right)))
        return original(left, right)

    monkeypatch.setattr("app.api.middleware.auth.hmac.compare_digest", compare)
    for key in ("first-key", "second-key"):  # the first and the last key of the comparison
        KEYS.check(Headers({"x-api-key": key}))
    with pytest.raises(errors.Forbidden):
        KEYS.check(Headers({"x-api-key": "f"}))
    assert compared == [(32, 32)] * 6


def test_generate_needs_a_key_and_exempt_paths_do_not() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        none = await client.post("/generate", content=b"not read", headers={"content-type": "text/plain"})
        assert (none.status_code, none.json()["code"]) == (401, "unauthorized")
        assert none.headers["www-authenticate"].startswith("Bearer")
        assert none.json()["request_id"] == none.headers["x-request-id"]
        wrong = await client.post("/generate", json=WORK, headers={"x-api-key": "guess"})
        assert (wrong.status_code, wrong.json()["code"]) == (403, "forbidden")
        assert "guess" not in wrong.text
        right = await client.post("/generate", json=WORK, headers={"authorization": "Bearer second-key"})
        assert right.status_code == 200
        for path in EXEMPT_PATHS:
            assert (await client.get(path)).status_code == 200, path
        for path in (
            "/static/",
            "/static/x",
            "/generate",
            "/generate/",
            "/health/",
            "/metrics/x",
            "//health",
            "/%2e/health",
        ):
            assert (await client.get(f"http://test{path}")).status_code == 401, path
        counted = (await client.get("/metrics")).text
        assert 'unfog_requests_total{code="401",route="/generate"} 2.0' in counted
        assert 'unfog_requests_total{code="403",route="/generate"} 1.0' in counted

    run(check, FakeRunner(), **WITH_KEYS)


def test_keys_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")

    async def check(client: httpx.AsyncClient) -> None:
        for key in ("second-key", "guessed-key"):
            await client.post("/generate", json=WORK, headers={"authorization": f"Bearer {key}"})

    run(check, FakeRunner(), **WITH_KEYS)
    # Leave out the log lines of the HTTP client.
    ours = [record for record in caplog.records if not record.name.startswith("http")]
    lines = [vars(record) for record in ours if record.name == "unfog.access"]
    assert [line.get("key") for line in lines] == [2, None]  # the log has only the position of the key
    assert not [record for record in ours if "-key" in str(record.__dict__)]


def test_rate_limit_applies_to_generate_and_not_to_health() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        statuses = [(await client.post("/generate", json=WORK)).status_code for _ in range(2)]
        limited = await client.post("/generate", json=WORK)
        assert statuses == [200, 200]
        assert (limited.status_code, limited.json()["code"]) == (429, "rate_limited")
        assert 1 <= int(limited.headers["retry-after"]) <= 3600
        for _ in range(5):
            assert (await client.get("/health")).status_code == 200
        counted = (await client.get("/metrics")).text
        assert 'unfog_rejected_total{reason="rate_limited"} 1.0' in counted
        assert 'unfog_requests_total{code="429",route="/generate"} 1.0' in counted

    run(check, FakeRunner(), rate_limit="2/hour")


def test_rate_limit_is_per_key_or_per_address_without_a_valid_key() -> None:
    async def post(client: httpx.AsyncClient, key: str) -> int:
        return (await client.post("/generate", json=WORK, headers={"x-api-key": key})).status_code

    async def check(client: httpx.AsyncClient) -> None:
        assert [await post(client, "guess") for _ in range(3)] == [403, 403, 429]
        assert [await post(client, "first-key") for _ in range(3)] == [200, 200, 429]
        assert [await post(client, "second-key") for _ in range(3)] == [200, 200, 429]

    run(check, FakeRunner(), rate_limit="2/hour", **WITH_KEYS)


BROWSER: dict[str, Any] = {"origin": "https://page.example", "access-control-request-method": "POST"}
PREFLIGHT = BROWSER | {"access-control-request-headers": "x-api-key,content-type"}


def test_cors_headers_are_sent_to_listed_origins_also_on_errors() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        asked = await client.options("/generate", headers=PREFLIGHT)
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == "https://page.example"
        assert "x-api-key" in asked.headers["access-control-allow-headers"].lower()
        assert asked.headers["x-request-id"]
        refused = await client.post("/generate", json=WORK, headers={"origin": "https://page.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://page.example"
        assert "X-Seed" in refused.headers["access-control-expose-headers"]
        other = await client.options("/generate", headers={**PREFLIGHT, "origin": "https://other.example"})
        assert (other.status_code, other.json()["code"]) == (400, "origin_not_allowed")
        assert other.json()["request_id"] == other.headers["x-request-id"]
        assert "access-control-allow-origin" not in other.headers

    run(check, FakeRunner(), cors_origins="https://page.example", **WITH_KEYS)


def test_cors_headers_are_not_sent_without_configured_origins() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        assert (await client.options("/generate", headers=PREFLIGHT)).status_code == 405
        answer = await client.post("/generate", json=WORK, headers={"origin": "https://page.example"})
        assert answer.status_code == 200
        assert "access-control-allow-origin" not in answer.headers

    run(check, FakeRunner())


def test_every_response_has_security_headers() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        answers = [await client.get(path) for path in ("/health", "/metrics", "/nowhere", "/docs", "/")]
        answers.append(await client.post("/generate", json=WORK))
        answers.append(await client.post("/generate", json=WORK, headers={"accept": "text/event-stream"}))
        for answer in answers:
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["x-frame-options"] == "DENY"
            assert answer.headers["referrer-policy"] == "no-referrer"
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'")
            assert ("script-src" in policy) is (answer.request.url.path in ("/docs", "/"))

    run(check, FakeRunner())
