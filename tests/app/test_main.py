"""Tests of the application within this process, with a runner that fails like a device or like a bug."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import httpx
import pytest

from app.api.http.requests import MAX_UNKNOWN_FIELDS
from app.engine.interface import DeviceLostError
from app.engine.job import Pixels
from app.main import create_app
from app.settings import Settings
from model.spec import Guidance, Sampler
from tests.app.api.examples import PICTURE_TASKS
from tests.app.application import WORK, run
from tests.app.clip_fakes import FakeClip
from tests.app.fakes import INFO, WAIT_SECONDS, FakeRunner, Rows


def raise_for_seed(seed: int, error: Exception) -> Callable[[Rows], None]:
    def on_step(rows: Rows) -> None:
        if any(row.job.request.options.seed == seed for row in rows):
            raise error

    return on_step


def test_bug_fails_only_its_own_request_and_details_are_not_sent() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        bad, good = await asyncio.gather(
            client.post("/generate", json={**WORK, "seed": 13, "count": 3}), client.post("/generate", json=WORK)
        )
        assert (bad.status_code, bad.json()["code"]) == (500, "internal_error")
        assert "secret" not in bad.text
        assert good.status_code == 200
        assert (await client.get("/health")).status_code == 200

    run(check, FakeRunner(on_step=raise_for_seed(13, KeyError("secret"))))


def test_lost_device_fails_all_requests_and_probes_with_503() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        lost = await client.post("/generate", json={**WORK, "seed": 13})
        later = await client.post("/generate", json=WORK)
        for answer in (lost, later):
            assert (answer.status_code, answer.json()["code"]) == (503, "engine_failed")
            assert int(answer.headers["retry-after"]) >= 1
        for probe in ("/health", "/livez", "/readyz", "/startupz"):
            assert (await client.get(probe)).status_code == 503
        assert (await client.get("/health")).json()["status"] == "failed"

    run(check, FakeRunner(on_step=raise_for_seed(13, DeviceLostError("gone"))))


def test_stuck_engine_fails_the_probes_and_requests_end_at_their_deadline() -> None:
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


def test_digit_beyond_the_classes_of_the_checkpoint_is_rejected() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        answer = await client.post("/generate", json={**WORK, "digit": 5})
        assert (answer.status_code, answer.json()["errors"][0]["loc"]) == (422, ["body", "digit"])
        assert (await client.post("/generate", json={**WORK, "digit": 4})).status_code == 200

    run(check, FakeRunner(models={"default": replace(INFO, class_names=tuple("01234"))}))


def test_guidance_is_rejected_for_a_checkpoint_without_guidance() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        answer = await client.post("/generate", json={**WORK, "guidance_scale": 2})
        assert (answer.status_code, answer.json()["errors"][0]["loc"]) == (422, ["body", "guidance_scale"])
        assert (await client.post("/generate", json={**WORK, "guidance_scale": 1})).status_code == 200

    run(check, FakeRunner(models={"default": replace(INFO, guidable=False)}))


GUIDANCE: dict[Sampler, Guidance] = {"ddpm": Guidance(1.5), "ddim": Guidance(3.0), "dpmpp": Guidance(2.0)}
FAST = replace(INFO, name="fast", sha256="f" * 64, steps=(4, 2), samplers=("ddim",), guidable=False)


def test_missing_fields_use_the_defaults_of_the_model() -> None:
    runner = FakeRunner(models={"default": replace(INFO, guidance=GUIDANCE), "fast": FAST})

    async def check(client: httpx.AsyncClient) -> None:
        own = (await client.post("/generate", json={"digit": 3, "seed": 1, "sampler": "dpmpp"})).json()
        assert (own["sampler"], own["guidance_scale"]) == ("dpmpp", 2.0)
        for model, expected in (("default", (100, "ddpm", 1.5, "0")), ("fast", (4, "ddim", 1.0, "f"))):
            answer = (await client.post("/generate", json={"digit": 3, "seed": 1, "model": model})).json()
            used = answer["num_steps"], answer["sampler"], answer["guidance_scale"], answer["model"]["sha256"][0]
            assert used == expected
            assert answer["model"]["name"] == model
        assert {row.job.request.options.model for rows in runner.calls for row in rows} == {"default", "fast"}
        models = (await client.get("/health")).json()["models"]
        assert [(m["name"], m["sha256"][0]) for m in models] == [("default", "0"), ("fast", "f")]
        assert 'unfog_model_info{device="cpu",dtype="float32",name="fast"' in (await client.get("/metrics")).text

    run(check, runner)


def test_job_has_guided_steps_if_guidance_is_on() -> None:
    runner = FakeRunner()

    async def check(client: httpx.AsyncClient) -> None:
        for scale in (1, 2):
            await client.post("/generate", json={**WORK, "num_steps": 4, "guidance_scale": scale})
        assert list(dict.fromkeys(row.job.request.guided_steps for rows in runner.calls for row in rows)) == [
            range(0),
            range(2),  # INFO applies guidance in half of the steps
        ]

    run(check, runner)


@pytest.mark.parametrize(
    ("field", "wrong", "right"), [("num_steps", 3, 2), ("sampler", "ddpm", "ddim"), ("guidance_scale", 2, 1)]
)
def test_value_that_the_model_does_not_support_is_rejected_with_its_field(
    field: str, wrong: object, right: object
) -> None:
    body = {"digit": 3, "seed": 1, "model": "fast"}

    async def check(client: httpx.AsyncClient) -> None:
        answer = await client.post("/generate", json={**body, field: wrong})
        assert (answer.status_code, answer.json()["errors"][0]["loc"]) == (422, ["body", field])
        assert (await client.post("/generate", json={**body, field: right})).status_code == 200

    run(check, FakeRunner(models={"default": INFO, "fast": FAST}))


def test_error_about_an_unknown_model_lists_the_served_models() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        answer = await client.post("/generate", json={**WORK, "model": "slow"})
        assert answer.status_code == 422
        assert "'default' or 'fast'" in answer.json()["errors"][0]["msg"]

    run(check, FakeRunner(models={"default": INFO, "fast": FAST}))


def test_stream_ends_with_an_error_event_if_encoding_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> bytes:
        raise ValueError("secret")

    monkeypatch.setattr("app.api.native.events.encode_image", fail)

    async def check(client: httpx.AsyncClient) -> None:
        answer = await client.post("/generate", json=WORK, headers={"accept": "text/event-stream"})
        events = answer.text.strip().split("\n\n")
        assert events[-1].startswith("event: error\n")
        assert '"internal_error"' in events[-1]
        assert "secret" not in answer.text

    run(check, FakeRunner())


def test_requests_to_unknown_paths_are_counted_with_route_other() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        for path in ("/health", "/docs", "/openapi.json", "/docs/", "/a", "/b"):
            await client.get(path)
        text = (await client.get("/metrics")).text
        lines = [line for line in text.splitlines() if line.startswith("unfog_requests_total")]
        counted = {line for line in lines if not line.endswith(" 0.0")}
        assert counted == {
            'unfog_requests_total{code="200",route="/health"} 1.0',
            'unfog_requests_total{code="200",route="/docs"} 1.0',
            'unfog_requests_total{code="200",route="/openapi.json"} 1.0',
            'unfog_requests_total{code="404",route="other"} 3.0',
        }

    run(check, FakeRunner())


def test_request_counters_of_the_tasks_start_at_zero() -> None:
    """PromQL's rate() ignores the first value of a new series, so each series must exist before the first request."""

    async def check(client: httpx.AsyncClient) -> None:
        text = (await client.get("/metrics")).text
        for route in ("/generate", *PICTURE_TASKS, "/reproduce", "/score"):
            for code in (200, 429, 500, 503, 504):
                assert f'unfog_requests_total{{code="{code}",route="{route}"}} 0.0' in text

    run(check, FakeRunner())


def test_error_lists_a_limited_number_of_unknown_fields() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        answer = await client.post("/generate", json={f"f{i}": i for i in range(1000)})
        assert answer.status_code == 422
        assert len(answer.json()["errors"]) == MAX_UNKNOWN_FIELDS

    run(check, FakeRunner())


def test_clip_process_ends_if_the_service_stops_while_it_becomes_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    clip, may_continue = FakeClip(), threading.Event()

    def read() -> Sequence[Sequence[Pixels]]:
        assert may_continue.wait(WAIT_SECONDS)
        return ()

    monkeypatch.setattr("app.main.read_real_digits", read)

    async def main() -> None:
        app = create_app(Settings(), lambda: FakeRunner(clip=clip))
        async with app.router.lifespan_context(app):
            await asyncio.wrap_future(app.state.service.engine.ready)
            asyncio.get_running_loop().call_later(0.2, may_continue.set)

    asyncio.run(main())
    assert clip.is_closed
