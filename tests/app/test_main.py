"""The application in this process, on a runner that fails as a device would."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace

import httpx
import pytest

from app.api.requests import MAX_UNKNOWN_FIELDS
from app.engine.interface import DeviceLostError
from model.sampler import Sampler
from tests.app.application import WORK, run
from tests.app.fakes import INFO, FakeRunner, Rows


def fails_for(seed: int, error: Exception) -> Callable[[Rows], None]:
    def on_step(rows: Rows) -> None:
        if any(row.job.request.options.seed == seed for row in rows):
            raise error

    return on_step


def test_a_bug_costs_its_own_request_and_says_nothing_of_itself() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        bad, good = await asyncio.gather(
            client.post("/generate", json={**WORK, "seed": 13, "count": 3}), client.post("/generate", json=WORK)
        )
        assert (bad.status_code, bad.json()["code"]) == (500, "internal_error")
        assert "secret" not in bad.text
        assert good.status_code == 200
        assert (await client.get("/health")).status_code == 200

    run(check, FakeRunner(on_step=fails_for(13, KeyError("secret"))))


def test_a_lost_device_answers_everyone_and_turns_the_probes() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        lost = await client.post("/generate", json={**WORK, "seed": 13})
        later = await client.post("/generate", json=WORK)
        for answer in (lost, later):
            assert (answer.status_code, answer.json()["code"]) == (503, "engine_failed")
            assert int(answer.headers["retry-after"]) >= 1
        for probe in ("/health", "/livez", "/readyz", "/startupz"):
            assert (await client.get(probe)).status_code == 503
        assert (await client.get("/health")).json()["status"] == "failed"

    run(check, FakeRunner(on_step=fails_for(13, DeviceLostError("gone"))))


def test_an_engine_that_hangs_is_neither_alive_nor_ready_and_its_waiters_are_answered() -> None:
    hung, release = threading.Event(), threading.Event()

    def hang(rows: Rows) -> None:
        hung.set()
        release.wait()

    async def check(client: httpx.AsyncClient) -> None:
        try:
            answer = await client.post("/generate", json={**WORK, "timeout_seconds": 0.3})
            assert (answer.status_code, answer.json()["code"]) == (504, "deadline_exceeded")
            assert hung.is_set()
            for probe in ("/health", "/livez", "/readyz"):
                assert (await client.get(probe)).status_code == 503
            assert "unfog_ready 0.0" in (await client.get("/metrics")).text
        finally:
            release.set()

    run(check, FakeRunner(on_step=hang), watchdog_seconds=0.01)


def test_a_digit_that_the_checkpoint_has_not_is_refused() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        answer = await client.post("/generate", json={**WORK, "digit": 5})
        assert (answer.status_code, answer.json()["errors"][0]["loc"]) == (422, ["body", "digit"])
        assert (await client.post("/generate", json={**WORK, "digit": 4})).status_code == 200

    run(check, FakeRunner(models={"default": replace(INFO, num_classes=5)}))


def test_guidance_is_refused_where_no_label_was_dropped_in_training() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        answer = await client.post("/generate", json={**WORK, "guidance_scale": 2})
        assert (answer.status_code, answer.json()["errors"][0]["loc"]) == (422, ["body", "guidance_scale"])
        assert (await client.post("/generate", json={**WORK, "guidance_scale": 1})).status_code == 200

    run(check, FakeRunner(models={"default": replace(INFO, guidable=False)}))


SCALES: dict[Sampler, float] = {"ddpm": 1.5, "ddim": 3.0, "dpmpp": 2.0}
FAST = replace(INFO, name="fast", sha256="f" * 64, steps=(4, 2), default_steps=4, samplers=("ddim",), guidable=False)


def test_a_model_draws_by_its_own_recommendation_where_the_request_says_nothing() -> None:
    runner = FakeRunner(models={"default": replace(INFO, guidance_scale=SCALES), "fast": FAST})

    async def check(client: httpx.AsyncClient) -> None:
        own = (await client.post("/generate", json={"digit": 3, "seed": 1, "sampler": "dpmpp"})).json()
        assert (own["sampler"], own["guidance_scale"]) == ("dpmpp", 2.0)
        for model, expected in (("default", (100, "ddpm", 1.5, "0")), ("fast", (4, "ddim", 1.0, "f"))):
            answer = (await client.post("/generate", json={"digit": 3, "seed": 1, "model": model})).json()
            drawn = answer["num_steps"], answer["sampler"], answer["guidance_scale"], answer["model"]["sha256"][0]
            assert drawn == expected
            assert answer["model"]["name"] == model
        assert {row.job.request.options.model for rows in runner.calls for row in rows} == {"default", "fast"}
        models = (await client.get("/health")).json()["models"]
        assert [(m["name"], m["sha256"][0]) for m in models] == [("default", "0"), ("fast", "f")]
        assert 'unfog_model_info{device="cpu",dtype="float32",name="fast"' in (await client.get("/metrics")).text

    run(check, runner)


def test_guided_steps_are_forecast_where_guidance_is_on() -> None:
    runner = FakeRunner()

    async def check(client: httpx.AsyncClient) -> None:
        for scale in (1, 2):
            await client.post("/generate", json={**WORK, "num_steps": 4, "guidance_scale": scale})
        assert list(dict.fromkeys(row.job.request.guided_steps for rows in runner.calls for row in rows)) == [
            range(0),
            range(2),  # by the fake's rule
        ]

    run(check, runner)


@pytest.mark.parametrize(
    ("field", "wrong", "right"), [("num_steps", 3, 2), ("sampler", "ddpm", "ddim"), ("guidance_scale", 2, 1)]
)
def test_what_a_model_does_not_permit_is_refused_by_name(field: str, wrong: object, right: object) -> None:
    body = {"digit": 3, "seed": 1, "model": "fast"}

    async def check(client: httpx.AsyncClient) -> None:
        answer = await client.post("/generate", json={**body, field: wrong})
        assert (answer.status_code, answer.json()["errors"][0]["loc"]) == (422, ["body", field])
        assert (await client.post("/generate", json={**body, field: right})).status_code == 200

    run(check, FakeRunner(models={"default": INFO, "fast": FAST}))


def test_an_unknown_model_is_answered_with_those_that_there_are() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        answer = await client.post("/generate", json={**WORK, "model": "slow"})
        assert answer.status_code == 422
        assert "'default' or 'fast'" in answer.json()["errors"][0]["msg"]

    run(check, FakeRunner(models={"default": INFO, "fast": FAST}))


def test_a_stream_whose_encoding_fails_ends_with_an_error_event(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> bytes:
        raise ValueError("secret")

    monkeypatch.setattr("app.api.events.encode_image", fail)

    async def check(client: httpx.AsyncClient) -> None:
        answer = await client.post("/generate", json=WORK, headers={"accept": "text/event-stream"})
        events = answer.text.strip().split("\n\n")
        assert events[-1].startswith("event: error\n")
        assert '"internal_error"' in events[-1]
        assert "secret" not in answer.text

    run(check, FakeRunner())


def test_routes_are_counted_by_name_and_paths_that_nobody_knows_together() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        for path in ("/health", "/docs", "/openapi.json", "/docs/", "/a", "/b"):
            await client.get(path)
        text = (await client.get("/metrics")).text
        counted = {
            line for line in text.splitlines() if line.startswith("unfog_requests_total") and "/generate" not in line
        }
        assert counted == {
            'unfog_requests_total{code="200",route="/health"} 1.0',
            'unfog_requests_total{code="200",route="/docs"} 1.0',
            'unfog_requests_total{code="200",route="/openapi.json"} 1.0',
            'unfog_requests_total{code="404",route="other"} 3.0',
        }

    run(check, FakeRunner())


def test_what_went_wrong_is_counted_from_zero() -> None:
    """Else a rate would not see the first time."""

    async def check(client: httpx.AsyncClient) -> None:
        text = (await client.get("/metrics")).text
        for code in (200, 429, 500, 503, 504):
            assert f'unfog_requests_total{{code="{code}",route="/generate"}} 0.0' in text

    run(check, FakeRunner())


def test_answer_to_a_thousand_unknown_fields_is_short() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        answer = await client.post("/generate", json={f"f{i}": i for i in range(1000)})
        assert answer.status_code == 422
        assert len(answer.json()["errors"]) == 1 + MAX_UNKNOWN_FIELDS  # the digit is missing, too

    run(check, FakeRunner())
