"""What is said of a request when it has ended."""

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
    """The facts of each line about a route."""
    records = [record for record in caplog.records if record.name == "unfog.access"]
    return [vars(record) for record in records if vars(record)["route"] == route]


@pytest.mark.parametrize("accept", ["application/json", "image/png", "application/zip", "text/event-stream"])
def test_a_line_has_what_was_drawn_and_where_the_time_went(caplog: pytest.LogCaptureFixture, accept: str) -> None:
    caplog.set_level(logging.INFO)
    body = WORK | {"count": 2, "sampler": "ddim", "guidance_scale": 2}

    async def check(client: httpx.AsyncClient) -> None:
        await client.post("/generate", json=body, headers={"accept": accept, "x-request-id": "find-me"})

    run(check, FakeRunner())
    (line,) = lines_of(caplog)
    expected = {"request_id": "find-me", "status": 200, "outcome": "ok", "client": "127.0.0.1"}
    drawn = {"model": "default", "digit": 3, "count": 2, "seed": 1, "num_steps": 3, "sampler": "ddim"}
    assert expected | drawn | {"guidance_scale": 2.0} == {
        name: line[name] for name in (*expected, *drawn, "guidance_scale")
    }
    phases = [line[f"{phase}_seconds"] for phase in ("queue", "denoise", "encode")]
    assert all(0 <= seconds <= line["seconds"] for seconds in phases)
    assert line["encode_seconds"] > 0
    if accept != "text/event-stream":  # which encodes one image while another is drawn
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
def test_the_outcome_of_what_went_wrong_is_its_code(
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
    assert line["status"] == (200 if headers and status >= 500 else status)  # a stream had begun


def test_a_row_that_fails_is_logged_with_the_request_that_it_was_of(caplog: pytest.LogCaptureFixture) -> None:
    def fail(rows: Rows) -> None:
        raise KeyError("a bug")

    async def check(client: httpx.AsyncClient) -> None:
        await client.post("/generate", json=WORK, headers={"x-request-id": "find-me"})

    run(check, FakeRunner(on_step=fail))
    (record,) = [record for record in caplog.records if record.name == "app.engine.engine"]
    assert vars(record)["request_id"] == "find-me"
    assert record.exc_info


def test_probes_and_scrapes_that_are_well_are_not_worth_a_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def check(client: httpx.AsyncClient) -> None:
        await client.get("/health")
        await client.get("/metrics")
        await client.post("/health")

    run(check, FakeRunner())
    levels = [line["levelno"] for route in ("/health", "/metrics") for line in lines_of(caplog, route)]
    assert levels == [logging.DEBUG, logging.INFO, logging.DEBUG]


def test_the_outcome_of_a_probe_that_fails_is_why(caplog: pytest.LogCaptureFixture) -> None:
    def fail(rows: Rows) -> None:
        raise DeviceLostError("gone")

    async def check(client: httpx.AsyncClient) -> None:
        await client.post("/generate", json=WORK)
        await client.get("/livez")

    caplog.set_level(logging.INFO)
    run(check, FakeRunner(on_step=fail))
    (line,) = lines_of(caplog, "/livez")
    assert (line["status"], line["outcome"], line["levelno"]) == (503, "engine_failed", logging.INFO)


def test_a_path_is_logged_as_it_came(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def check(client: httpx.AsyncClient) -> None:
        await client.get("/%0aforged%20line")

    run(check, FakeRunner())
    (record,) = [record for record in caplog.records if record.name == "unfog.access"]
    assert record.getMessage() == "GET /%0aforged%20line"
