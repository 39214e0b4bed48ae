"""Tests of GET /models."""

import asyncio
from dataclasses import replace

import httpx
import pytest
import torch

from app.api.native.examples import PREVIEW
from app.api.native.models import EXAMPLE
from app.engine.interface import ModelInfo
from app.main import create_app
from app.runner.clip import ClipModel
from app.runner.runner import Runner
from app.settings import Settings
from model import checkpoint
from model.schedule import Schedule, ScheduleConfig
from model.spec import SHIPPED
from tests.app.application import run
from tests.app.fakes import INFO, FakeRunner

KEY = "a-key-for-this-test"


def test_models_are_listed_with_the_options_that_they_permit() -> None:
    fast = replace(INFO, name="fast", steps=(4, 2), samplers=("ddim",), guidable=False)

    async def check(client: httpx.AsyncClient) -> None:
        response = await client.get("/models")
        assert (response.status_code, response.headers["cache-control"]) == (200, "no-store")
        default, second = response.json()["models"]
        assert (default["name"], default["steps"], default["max_steps"], default["guidable"]) == (
            "default",
            [],
            100,
            True,
        )
        assert default["samplers"] == ["ddpm", "ddim", "dpmpp"]
        assert default["guidance_interval"] == {"ddpm": [51, 100], "ddim": [51, 100], "dpmpp": [51, 100]}
        assert (second["name"], second["steps"], second["default_steps"]) == ("fast", [4, 2], 4)
        assert (second["samplers"], second["guidable"]) == (["ddim"], False)
        assert default["qualities"]["balanced"] == {"sampler": "dpmpp", "num_steps": 10}
        assert [each["num_steps"] for each in second["qualities"].values()] == [2, 4, 4]

    run(check, FakeRunner(models={"default": INFO, "fast": fast}))


def test_alpha_bar_has_every_timestep_and_max_steps_is_the_limit_of_requests() -> None:
    schedule = Schedule(ScheduleConfig(num_steps=1500))

    async def check(client: httpx.AsyncClient) -> None:
        (model,) = (await client.get("/models")).json()["models"]
        assert model["alpha_bar"] == [round(value, 6) for value in schedule.alpha_bar.tolist()]
        assert (len(model["alpha_bar"]), model["alpha_bar"][0], model["max_steps"]) == (1501, 1.0, 1000)

    run(check, FakeRunner(models={"default": replace(INFO, schedule=schedule)}))


def test_limits_are_those_of_the_settings() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        assert (await client.get("/models")).json()["limits"] == {
            "count": 7,
            "timeout_seconds": 12.5,
            "image_bytes": 100_000,
            "queue_images": 50,
        }

    run(check, FakeRunner(), max_count=7, request_timeout=12.5, max_image_bytes=100_000, queue_capacity=50)


@pytest.mark.parametrize(
    "info", [INFO, replace(INFO, steps=(100,)), replace(INFO, image_shape=(3, 28, 28), normalises_drawings=False)]
)
def test_has_picture_tasks_is_true_if_the_routes_for_pictures_accept_the_model(info: ModelInfo) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        (model,) = (await client.get("/models")).json()["models"]
        body = {"image": PREVIEW, "digit": 1, "seed": 1}
        assert model["has_picture_tasks"] == ((await client.post("/edit", json=body)).status_code == 200)

    run(check, FakeRunner(models={"default": info}))


def test_facts_that_the_checkpoint_lacks_are_absent() -> None:
    info = replace(INFO, training=replace(INFO.training, preset=None, data=None, epochs=None, evaluations=()))

    async def check(client: httpx.AsyncClient) -> None:
        assert (await client.get("/models")).json()["models"][0]["training"] == {"evaluations": []}

    run(check, FakeRunner(models={"default": info}))


def test_answer_is_503_until_a_model_is_loaded() -> None:
    async def main() -> None:
        app = create_app(Settings(), FakeRunner)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            response = await client.get("/models")
        assert (response.status_code, response.json()["code"]) == (503, "starting")
        assert int(response.headers["retry-after"]) >= 1

    asyncio.run(main())


def test_key_is_required_if_keys_are_set() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        assert (await client.get("/models")).status_code == 401
        assert (await client.get("/models", headers={"X-API-Key": "wrong"})).status_code == 403
        assert (await client.get("/models", headers={"X-API-Key": KEY})).status_code == 200

    run(check, FakeRunner(), api_keys=KEY)


def test_requests_are_counted_with_their_route() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        await client.get("/models")
        assert 'unfog_requests_total{code="200",route="/models"} 1.0' in (await client.get("/metrics")).text

    run(check, FakeRunner())


def test_example_of_the_document_is_the_answer_for_the_shipped_checkpoint() -> None:
    info = Runner({"default": checkpoint.load(SHIPPED)}, torch.device("cpu"), torch.bfloat16).models["default"]

    async def check(client: httpx.AsyncClient) -> None:
        answer = (await client.get("/models")).json()
        evaluations = answer["models"][0]["training"]["evaluations"]
        del evaluations[1:]
        assert answer == EXAMPLE

    clip = ClipModel.load("auto", torch.device("cpu"))
    run(check, FakeRunner(models={"default": replace(info, compiled=True)}, clip=clip))


def test_clip_is_null_without_a_clip_model() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        assert (await client.get("/models")).json()["clip"] is None

    run(check, FakeRunner())
