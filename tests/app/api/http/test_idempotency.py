"""Tests of the header Idempotency-Key: a retry without a seed gets the same images."""

import hashlib

import httpx
import pytest

from app.api.http.idempotency import seed_of
from tests.app.application import run
from tests.app.fakes import FakeRunner

BODY = {"digit": 3, "num_steps": 3}
KEY = "order-4711 ~"


def header(key: str | bytes) -> dict[str, str | bytes]:
    return {"idempotency-key": key}


def test_seed_is_the_first_53_bits_of_the_sha256_digest_of_the_key() -> None:
    bits = "".join(f"{byte:08b}" for byte in hashlib.sha256(KEY.encode()).digest())
    assert seed_of(KEY) == int(bits[:53], 2)


def test_requests_with_the_same_key_have_the_same_seed() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        answers = [(await client.post("/generate", json=BODY, headers=header(KEY))).json() for _ in range(2)]
        assert [answer["seed"] for answer in answers] == [seed_of(KEY)] * 2
        assert answers[0]["images"] == answers[1]["images"]
        other = (await client.post("/generate", json=BODY, headers=header("other"))).json()
        assert other["seed"] == seed_of("other") != seed_of(KEY)

    run(check, FakeRunner())


def test_seed_of_the_request_takes_precedence() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        answer = await client.post("/generate", json={**BODY, "seed": 0}, headers=header(KEY))
        assert answer.json()["seed"] == 0

    run(check, FakeRunner())


@pytest.mark.parametrize("key", ["k", " ~", "k" * 255])
def test_key_of_1_to_255_printable_characters_is_accepted(key: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        # httpx sends the spaces at the ends, and a server removes them.
        answer = await client.post("/generate", json=BODY, headers=header(key))
        assert answer.json()["seed"] in (seed_of(key), seed_of(key.strip()))

    run(check, FakeRunner())


@pytest.mark.parametrize(
    "key", ["", "k" * 256, "tab\tkey", "sieben \N{DIGIT SEVEN}\N{LATIN SMALL LETTER U WITH DIAERESIS}"]
)
@pytest.mark.parametrize("body", [BODY, {**BODY, "seed": 1}], ids=["without_seed", "with_seed"])
def test_invalid_key_is_refused(key: str, body: dict[str, int]) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        answer = await client.post("/generate", json=body, headers=header(key.encode()))
        assert answer.status_code == 422
        assert answer.json()["errors"][0]["loc"] == ["header", "Idempotency-Key"]

    run(check, FakeRunner())


@pytest.mark.parametrize("second", ["other", KEY])
def test_repeated_key_is_refused(second: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        headers = [("idempotency-key", KEY), ("idempotency-key", second)]
        answer = await client.post("/generate", json=BODY, headers=headers)
        assert answer.status_code == 422
        assert answer.json()["errors"][0]["loc"] == ["header", "Idempotency-Key"]
        assert "more than once" in answer.json()["detail"]

    run(check, FakeRunner())
