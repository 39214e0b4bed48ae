"""Tests of the read routes of the Open Inference Protocol, and of the access to all of its routes."""

import asyncio
import logging
import threading
from dataclasses import replace
from typing import Any

import httpx
import pytest

from app import VERSION
from app.engine.interface import DeviceLostError
from app.main import create_app
from app.settings import Settings
from tests.app.api.inference.bodies import INFER, LENGTH, assert_error, body_of
from tests.app.application import run
from tests.app.fakes import INFO, WAIT_SECONDS, FakeRunner, Rows

FAST = replace(INFO, name="fast", steps=(4, 2), samplers=("ddim",), guidable=False)
TWO_MODELS = {"default": INFO, "fast": FAST}


# Health and metadata


def test_read_routes_describe_the_service_and_its_models() -> None:
    seed = {"name": "seed", "datatype": "INT64", "shape": [-1]}
    color = replace(FAST, image_shape=(3, 32, 48))
    expected: dict[str, tuple[int, Any]] = {
        "/v2": (200, {"name": "unfog", "version": VERSION, "extensions": ["binary_tensor_data"]}),
        "/v2/health/live": (200, {"live": True}),
        "/v2/health/ready": (200, {"ready": True}),
        "/v2/models/fast/ready": (200, {"name": "fast", "ready": True}),
    }

    async def check(client: httpx.AsyncClient) -> None:
        for path, answer in expected.items():
            response = await client.get(path)
            assert (response.status_code, response.json()) == answer
            head = await client.head(path)
            assert (head.status_code, head.content) == (200, b"")
        for name, shape in (("default", [-1, 28, 28, 1]), ("fast", [-1, 32, 48, 3])):
            assert (await client.get(f"/v2/models/{name}")).json() == {
                "name": name,
                "platform": "pytorch_safetensors",
                "inputs": [{"name": "digit", "datatype": "INT64", "shape": [-1]}, seed],
                "outputs": [{"name": "image", "datatype": "UINT8", "shape": shape}, seed],
            }

    run(check, FakeRunner(models={"default": INFO, "fast": color}))


def test_unknown_model_is_404_and_the_message_names_the_models() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        responses = [await client.get(f"/v2/models/none{end}") for end in ("", "/ready")]
        responses.append(await client.post("/v2/models/none/infer", json=body_of([1])))
        for response in responses:
            assert_error(response, 404, "The models are: default, fast")

    run(check, FakeRunner(models=TWO_MODELS))


def test_paths_and_methods_without_a_route_have_the_error_format_of_the_protocol() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        for path in ("/v2/", "/v2/models", "/v2/models/default/versions/1/infer", "/v2/models/default/infer/x"):
            assert_error(await client.get(path), 404, "No route has this path")
        wrong = [("DELETE", "/v2"), ("POST", "/v2/models/default"), ("GET", INFER), ("HEAD", INFER), ("OPTIONS", INFER)]
        for method, path in wrong:
            response = await client.request(method, path)
            assert response.status_code == 405
            assert response.headers["allow"] == ("POST" if path == INFER else "GET, HEAD")

    run(check, FakeRunner())


def test_starting_service_is_live_and_not_ready() -> None:
    loading, may_load = threading.Event(), threading.Event()

    def load() -> FakeRunner:
        loading.set()
        assert may_load.wait(WAIT_SECONDS)
        return FakeRunner()

    async def main() -> None:
        app = create_app(Settings(), load)
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            try:
                await asyncio.to_thread(loading.wait, WAIT_SECONDS)
                assert (await client.get("/v2")).status_code == 200
                assert (await client.get("/v2/health/live")).json() == {"live": True}
                ready = await client.get("/v2/health/ready")
                assert (ready.status_code, ready.json()) == (503, {"ready": False})
                ready = await client.get("/v2/models/default/ready")
                assert (ready.status_code, ready.json()) == (503, {"name": "default", "ready": False})
                assert_error(await client.get("/v2/models/other/ready"), 404, "The models are: default, fast")
                for response in (await client.get("/v2/models/default"), await client.post(INFER, json=body_of([1]))):
                    assert_error(response, 503, "The service is starting")
                    assert int(response.headers["retry-after"]) >= 1
                assert_error(await client.get("/v2/models/other"), 404, "The models are: default, fast")
            finally:
                may_load.set()

    asyncio.run(main())


def test_failed_engine_is_neither_live_nor_ready() -> None:
    def lose(rows: Rows) -> None:
        raise DeviceLostError("gone")

    async def check(client: httpx.AsyncClient) -> None:
        assert_error(await client.post(INFER, json=body_of([1])), 503, "The engine has failed")
        later = await client.post(INFER, json=body_of([1]))
        assert_error(later, 503, "The engine has failed")
        assert int(later.headers["retry-after"]) >= 1
        for path, body in (
            ("/v2/health/live", {"live": False}),
            ("/v2/health/ready", {"ready": False}),
            ("/v2/models/default/ready", {"name": "default", "ready": False}),
        ):
            response = await client.get(path)
            assert (response.status_code, response.json()) == (503, body)

    run(check, FakeRunner(on_step=lose))


def test_read_routes_are_not_logged_at_level_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def check(client: httpx.AsyncClient) -> None:
        for path in ("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/default", "/v2/models/default/ready"):
            await client.get(path)
        await client.get("/v2/models/none/ready")

    run(check, FakeRunner())
    lines = [record for record in caplog.records if record.name == "unfog.access"]
    assert [line.levelno for line in lines] == [logging.DEBUG] * 5 + [logging.INFO]


# Keys, rate limit and metrics


def test_infer_needs_a_key_and_the_read_routes_do_not() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        for path in ("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/default", "/v2/models/default/ready"):
            assert (await client.get(path)).status_code == 200
        missing = await client.post(INFER, json=body_of([1]))
        assert_error(missing, 401, "An API key is required")
        assert missing.headers["www-authenticate"]
        assert_error(await client.post("/v2/models/x/infer", json=body_of([1])), 401)
        assert_error(await client.get("/v2/models/x/other"), 401)
        assert_error(await client.post(INFER, json=body_of([1]), headers={"x-api-key": "wrong"}), 403)
        for headers in ({"x-api-key": "the-key"}, {"authorization": "Bearer the-key"}):
            assert (await client.post(INFER, json=body_of([1]), headers=headers)).status_code == 200
        metrics = (await client.get("/metrics")).text
        for code, number in (("401", 2), ("403", 1), ("200", 2)):
            assert f'unfog_requests_total{{code="{code}",route="/v2/models/{{name}}/infer"}} {number}.0' in metrics

    run(check, FakeRunner(), api_keys="the-key")


def test_rate_limit_counts_infer_and_not_the_read_routes() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        for path in ("/v2", "/v2/health/live", "/v2/models/default", "/v2/models/default/ready"):
            assert [(await client.get(path)).status_code for _ in range(3)] == [200] * 3
        assert (await client.post(INFER, json=body_of([1]))).status_code == 200
        limited = await client.post(INFER, json=body_of([1]))
        assert_error(limited, 429, "The rate limit is exceeded")
        assert int(limited.headers["retry-after"]) >= 1
        metrics = (await client.get("/metrics")).text
        assert 'unfog_requests_total{code="429",route="/v2/models/{name}/infer"} 1.0' in metrics

    run(check, FakeRunner(), rate_limit="1/hour")


def test_series_of_infer_exist_before_the_first_request() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        metrics = (await client.get("/metrics")).text
        assert 'unfog_requests_total{code="200",route="/v2/models/{name}/infer"} 0.0' in metrics

    run(check, FakeRunner())


def test_pages_may_send_and_read_the_length_of_the_json_object() -> None:
    origin = "https://example.com"
    preflight = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": LENGTH}

    async def check(client: httpx.AsyncClient) -> None:
        assert (await client.options(INFER, headers=preflight)).status_code == 200
        response = await client.post(INFER, json=body_of([1]), headers={"Origin": origin})
        assert LENGTH in response.headers["access-control-expose-headers"]
        assert_error(await client.options(INFER, headers={**preflight, "Origin": "https://other.example"}), 400)

    run(check, FakeRunner(), cors_origins=origin)
