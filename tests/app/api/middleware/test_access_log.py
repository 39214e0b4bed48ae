"""Tests of the access log."""

import logging
import threading
from typing import Any

import httpx
import pytest

from app.engine.interface import DeviceLostError
from tests.app.application import WORK, run
from tests.app.fakes import FakeRunner, Rows

STREAM = {"accept": "text/event-stream"}


def lines_of(caplog: pytest.LogCaptureFixture, route: str = "/generate") -> list[dict[str, Any]]:
    """Returns the fields of each access log line of a route."""
    records = [record for record in caplog.records if record.name == "unfog.access"]
    return [vars(record) for record in records if vars(record)["route"] == route]


@pytest.mark.parametrize(
    "accept", ["application/json", "image/png", "application/zip", "text/event-stream", "image/webp"]
)
def test_line_contains_the_options_and_times_of_the_job(caplog: pytest.LogCaptureFixture, accept: str) -> None:
    caplog.set_level(logging.INFO)
    body = WORK | {"count": 2, "sampler": "ddim", "guidance_scale": 2}

    async def check(client: httpx.AsyncClient) -> None:
        await client.post("/generate", json=body, headers={"accept": accept, "x-request-id": "find-me"})

    run(check, FakeRunner())
    (line,) = lines_of(caplog)
    expected = {"request_id": "find-me", "status": 200, "outcome": "ok", "client": "127.0.0.1"}
    options = {"model": "default", "digit": 3, "count": 2, "seed": 1, "num_steps": 3, "sampler": "ddim"}
    assert expected | options | {"guidance_scale": 2.0} == {
        name: line[name] for name in (*expected, *options, "guidance_scale")
    }
    phases = [line[f"{phase}_seconds"] for phase in ("queue", "denoise", "encode")]
    assert all(0 <= seconds <= line["seconds"] for seconds in phases)
    assert line["encode_seconds"] > 0
    if accept != "text/event-stream":  # a stream encodes images while others are still running
        assert sum(phases) <= line["seconds"]


@pytest.mark.parametrize(
    ("body", "status", "outcome"),
    [
        ({"digit": 10}, 422, "invalid_request"),
        (WORK | {"seed": 13}, 500, "internal_error"),
        (WORK | {"seed": 14, "timeout_seconds": 0.05}, 504, "deadline_exceeded"),
    ],
)
@pytest.mark.parametrize("headers", [{}, STREAM], ids=["json", "stream"])
def test_outcome_of_a_failed_request_is_its_error_code(
    caplog: pytest.LogCaptureFixture, body: dict[str, Any], status: int, outcome: str, headers: dict[str, str]
) -> None:
    caplog.set_level(logging.INFO)
    release = threading.Event()

    def on_step(rows: Rows) -> None:
        seeds = {row.job.request.options.seed for row in rows}
        if 13 in seeds:
            raise KeyError("a bug")
        if 14 in seeds:
            release.wait()

    async def check(client: httpx.AsyncClient) -> None:
        try:
            await client.post("/generate", json=body, headers=headers)
        finally:
            release.set()

    run(check, FakeRunner(on_step=on_step))
    (line,) = lines_of(caplog)
    assert line["outcome"] == outcome
    assert line["status"] == (200 if headers and status >= 500 else status)  # the response status was already sent


def test_failed_row_is_logged_with_its_request_id(caplog: pytest.LogCaptureFixture) -> None:
    def fail(rows: Rows) -> None:
        raise KeyError("a bug")

    async def check(client: httpx.AsyncClient) -> None:
        await client.post("/generate", json=WORK, headers={"x-request-id": "find-me"})

    run(check, FakeRunner(on_step=fail))
    (record,) = [record for record in caplog.records if record.name == "app.engine.step_loop"]
    assert vars(record)["request_id"] == "find-me"
    assert record.exc_info


def test_successful_probes_and_scrapes_are_logged_at_debug(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def check(client: httpx.AsyncClient) -> None:
        await client.get("/health")
        await client.get("/metrics")
        await client.post("/health")

    run(check, FakeRunner())
    levels = [line["levelno"] for route in ("/health", "/metrics") for line in lines_of(caplog, route)]
    assert levels == [logging.DEBUG, logging.INFO, logging.DEBUG]


def test_outcome_of_a_failed_probe_is_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    def fail(rows: Rows) -> None:
        raise DeviceLostError("gone")

    async def check(client: httpx.AsyncClient) -> None:
        await client.post("/generate", json=WORK)
        await client.get("/livez")

    caplog.set_level(logging.INFO)
    run(check, FakeRunner(on_step=fail))
    (line,) = lines_of(caplog, "/livez")
    assert (line["status"], line["outcome"], line["levelno"]) == (503, "engine_failed", logging.INFO)


def test_path_is_logged_without_decoding(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def check(client: httpx.AsyncClient) -> None:
        await client.get("/%0aforged%20line")

    run(check, FakeRunner())
    (record,) = [record for record in caplog.records if record.name == "unfog.access"]
    assert record.getMessage() == "GET /%0aforged%20line"
