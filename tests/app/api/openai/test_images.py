"""The routes of the OpenAI Images API without a socket. tests/e2e/test_openai.py uses the clients of OpenAI."""

import asyncio
import base64
import json
import time
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from app.api.http.idempotency import seed_of
from app.api.openai.prompt import description_of
from app.main import create_app
from app.settings import Settings
from tests.app.api.openai.samples import EDITS, GENERATIONS, PATHS, body_of, encode, error_of, in_base64, mask, picture
from tests.app.api.openai.samples import send as send_to
from tests.app.application import client_of, run
from tests.app.fakes import INFO, FakeRunner, Gate, image, wait_until
from tests.e2e.service import open_png

FAST = replace(INFO, name="fast", steps=(4,), samplers=("ddim",), guidable=False)
KEY, ORIGIN = "a-key-for-this-test", "https://example.com"
IGNORED = {
    GENERATIONS: ["complexity", "frame_duration_ms", "moderation", "output_compression", "safety_identifier", "style"],
    EDITS: ["complexity", "frame_duration_ms", "input_fidelity", "output_compression", "safety_identifier", "user"],
}

both_paths = pytest.mark.parametrize("path", PATHS)


@both_paths
def test_response_has_the_fields_of_openai_and_the_images(path: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        response = await send_to(client, path, n=3, size="56x56", prompt="Draw a SEVEN!")
        answer = response.json()
        assert response.status_code == 200
        assert response.headers["content-type"] == "application/json"
        assert response.headers["x-seed"] == "3"
        assert [part.split(";")[0] for part in response.headers["server-timing"].split(", ")] == [
            "queue",
            "denoise",
            "encode",
        ]
        data = answer.pop("data")
        assert abs(answer.pop("created") - time.time()) < 60
        details = {"image_tokens": 0, "text_tokens": 0}
        assert answer == {
            "background": "opaque",
            "output_format": "png",
            "quality": "high",
            "size": "56x56",
            "seed": 3,
            "model": "default",
            "usage": {"input_tokens": 0, "input_tokens_details": details, "output_tokens": 0, "total_tokens": 0},
        }
        assert [each["revised_prompt"] for each in data] == [description_of(INFO, 7)] * 3
        for index, each in enumerate(data):
            pixels, chunks, _ = open_png(base64.b64decode(each["b64_json"], validate=True))
            num_steps = int(image(3, index, 0)[0, 3]) or pixels[0, -1]
            assert (pixels == image(3, index, num_steps).repeat(2, 0).repeat(2, 1)).all()
            assert (chunks["Digit"], chunks["Seed"], chunks["Index"]) == ("7", "3", str(index))
            assert chunks.get("Task") == (None if path == GENERATIONS else "edit")

    run(check, FakeRunner())


@pytest.mark.parametrize(
    ("fields", "path", "own"),
    [
        ({"n": 2}, "/generate", {"count": 2, "scale": 10}),
        ({"quality": "medium"}, "/generate", {"num_steps": 10, "sampler": "dpmpp", "scale": 10}),
        ({"quality": "low"}, "/generate", {"model": "fast", "scale": 10}),
        ({"model": "fast", "size": "28x28"}, "/generate", {"model": "fast"}),
        ({"image": in_base64(picture()), "n": 2}, "/edit", {"count": 2, "scale": 10}),
        (
            {"image": in_base64(picture()), "quality": "low"},
            "/edit",
            {"num_steps": 10, "sampler": "dpmpp", "scale": 10},
        ),
        ({"image": in_base64(picture()), "mask": in_base64(mask()), "quality": "low"}, "/inpaint", {"scale": 10}),
    ],
)
def test_files_equal_those_of_the_other_routes(fields: dict[str, Any], path: str, own: dict[str, Any]) -> None:
    """All bytes are equal: the pixels and the text chunks."""
    pictures = {"image": fields["image"]} if "image" in fields else {}
    if "mask" in fields:
        white = np.zeros((28, 28), np.uint8)
        white[14:] = 255
        pictures["mask"] = in_base64(encode(Image.fromarray(white)))

    async def check(client: httpx.AsyncClient) -> None:
        asked = await client.post(EDITS if pictures else GENERATIONS, json={"prompt": "four", "seed": 9, **fields})
        expected = await client.post(path, json={"digit": 4, "seed": 9, **own, **pictures})
        assert (asked.status_code, expected.status_code) == (200, 200), asked.text
        found = [each["b64_json"] for each in asked.json()["data"]]
        assert found == [each["png"] for each in expected.json()["images"]]

    run(check, FakeRunner(models={"default": INFO, "fast": FAST}))


@both_paths
def test_content_type_and_accept_are_ignored(path: str) -> None:
    content = json.dumps(body_of(path))
    headers = [
        {},
        {"Content-Type": "text/plain"},
        {"Content-Type": "x", "Accept": "text/event-stream"},
        {"Accept": "a/b"},
    ]

    async def check(client: httpx.AsyncClient) -> None:
        for each in headers:
            response = await client.post(path, content=content, headers=each)
            assert (response.status_code, response.headers["content-type"]) == (200, "application/json")

    run(check, FakeRunner())


@both_paths
def test_null_means_that_an_optional_field_is_absent(path: str) -> None:
    schema = create_app(Settings()).openapi()["components"]["schemas"]
    name = "ImageGenerationRequest" if path == GENERATIONS else "ImageEditRequest"
    fields = set(schema[name]["properties"]) | {"svg"} | ({"markup"} if path == EDITS else set())

    async def check(client: httpx.AsyncClient) -> None:
        required = {"prompt", "image"}
        nulls = dict.fromkeys(fields - required - {"seed"})
        response = await send_to(client, path, **nulls)
        assert (response.status_code, response.json()["size"]) == (200, "280x280"), response.text
        for field in required & fields:
            assert error_of(await send_to(client, path, **{field: None}), 400, "invalid_request")["param"] == field
        refused = await send_to(client, path, unknown=None)
        assert error_of(refused, 400, "invalid_request")["param"] == "unknown"

    run(check, FakeRunner())


@both_paths
def test_harmless_fields_are_ignored_whatever_their_value(path: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        expected = (await send_to(client, path)).json()["data"]
        for value in ("auto", "", -1, 1e300, True, [], {"a": [1, {"b": None}]}):
            response = await send_to(client, path, **dict.fromkeys(IGNORED[path], value))
            assert response.json().get("data") == expected, response.text

    run(check, FakeRunner())


UNSUPPORTED = [
    ("response_format", "url"),
    ("output_format", "webp"),
    ("output_format", "jpeg"),
    ("output_format", "gif"),
    ("output_format", "svg"),
    ("background", "transparent"),
    ("frame_count", 2),
    ("svg", {"model": "x"}),
    ("size", "1024x1024"),
    ("model", "gpt-4o"),
    ("quality", "ultra"),
    ("partial_images", 4),
    ("partial_images", -1),
    ("n", 0),
    ("n", 11),
    ("seed", -1),
    ("seed", 2**53),
    ("prompt", "a cat"),
    ("prompt", "7 and 8"),
    ("prompt", ""),
    ("prompt", "7" * 32_001),
    ("prompt", "\ud800 seven"),
    ("timeout_seconds", 1),
    ("digit", 7),
    ("markup", "x"),
]


@both_paths
def test_unsupported_values_are_refused_with_the_name_of_the_field(path: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        for field, value in UNSUPPORTED:
            error = error_of(await send_to(client, path, **{field: value}), 400, "invalid_request")
            assert (error["type"], error["param"]) == ("invalid_request_error", field), error
            assert error["message"].startswith(f"{field}: ")

    run(check, FakeRunner(), max_body_bytes=100_000)


WRONG: list[Any] = [None, 1, -1, 1.5, 1e400, 10**400, True, "", "x", "1", [], ["7"], {}, {"a": {}}, "\ud800", "\x00"]
TYPED = ["prompt", "n", "size", "model", "quality", "stream", "partial_images", "seed", "background", "output_format"]
TYPED += ["response_format", "frame_count"]


@both_paths
def test_values_of_a_wrong_type_are_refused_with_the_name_of_the_field(path: str) -> None:
    accepted = []

    async def check(client: httpx.AsyncClient) -> None:
        for field in (*TYPED, "image", "mask"):
            for value in WRONG:
                response = await send_to(client, path, **{field: value})
                if response.status_code == 200:
                    accepted.append((field, value))
                    continue
                error = error_of(response, 400, response.json()["error"]["code"])
                assert error["code"] in ("invalid_request", "invalid_image")
                assert error["param"] == field, (value, error)

    run(check, FakeRunner())
    others = {(field, value) for field, value in accepted if value is not None}
    assert others == {
        ("prompt", "1"),
        ("n", 1),
        ("stream", True),
        ("partial_images", 1),
        ("seed", 1),
        ("frame_count", 1),
    }


BODIES = [
    (b"", 400, "malformed_json"),
    (b"{", 400, "malformed_json"),
    (b"\xff", 400, "malformed_json"),
    (b"prompt=7", 400, "malformed_json"),
    (b"[" * 5000, 400, "malformed_json"),
    (b"[]", 400, "invalid_request"),
    (b"7", 400, "invalid_request"),
    (b"{}", 400, "invalid_request"),
    (b'{"prompt": "7", "\\ud800": 1}', 400, "invalid_request"),
    (b'{"prompt": "7", "prompt": "8"}', 400, "invalid_request"),
    (b'{"prompt": "7", "n": ' + b"9" * 5000 + b"}", 400, "invalid_request"),
    (b'{"prompt": "7", "user": ' + b"[" * 4000 + b"]" * 4000 + b"}", 400, "malformed_json"),
]


@both_paths
def test_malformed_bodies_are_refused_in_the_format_of_openai(path: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        for content, status, code in BODIES:
            error_of(await client.post(path, content=content), status, code)

    run(check, FakeRunner())


@both_paths
def test_body_over_the_limit_is_refused_in_the_format_of_openai(path: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        error = error_of(await client.post(path, content=b" " * 30_001), 413, "body_too_large")
        assert "30000 bytes" in error["message"]

    run(check, FakeRunner(), max_body_bytes=30_000, max_image_bytes=30_000)


def form(parts: dict[str, Any], files: list[tuple[str, Any]]) -> dict[str, Any]:
    return {
        "data": parts,
        "files": [(name, ("upload", content, "application/octet-stream")) for name, content in files],
    }


@pytest.mark.parametrize("name", ["image", "image[]"])
def test_multipart_edit_equals_the_edit_in_json(name: str) -> None:
    parts = {"prompt": "7", "seed": "3", "n": "2", "size": "28x28", "stream": "false", "user": "", "quality": ""}

    async def check(client: httpx.AsyncClient) -> None:
        expected = (await send_to(client, EDITS, n=2, mask=in_base64(mask()))).json()["data"]
        response = await client.post(EDITS, **form(parts, [(name, picture()), ("mask", mask())]))
        assert response.json()["data"] == expected

    run(check, FakeRunner())


REFUSED_FORMS: list[tuple[dict[str, str], list[tuple[str, Any]], str | None, str]] = [
    ({"prompt": "7"}, [("image", picture()), ("image", picture())], "image", "invalid_request"),
    ({"prompt": "7"}, [("image[]", picture()), ("image[]", picture())], "image", "invalid_request"),
    ({"prompt": "7"}, [("mask", mask())], "image", "invalid_request"),
    ({}, [("image", picture())], "prompt", "invalid_request"),
    ({"prompt": ""}, [("image", picture())], "prompt", "invalid_request"),
    ({"prompt": "7", "n": "two"}, [("image", picture())], "n", "invalid_request"),
    ({"prompt": "7", "n": "11"}, [("image", picture())], "n", "invalid_request"),
    ({"prompt": "7", "stream": "yes"}, [("image", picture())], "stream", "invalid_request"),
    ({"prompt": "7", "seed": "9" * 500}, [("image", picture())], "seed", "invalid_request"),
    ({"prompt": "7"}, [("image", picture()), ("markup", mask())], "markup", "invalid_request"),
    ({"prompt": "7"}, [("image", picture()), ("other", b"x")], "other", "invalid_request"),
    ({"prompt": "7"}, [("image", b"")], "image", "invalid_image"),
    ({"prompt": "7"}, [("image", b"no picture")], "image", "invalid_image"),
    ({"prompt": "7"}, [("image", picture()[:-20])], "image", "invalid_image"),
    ({"prompt": "7"}, [("image", picture()), ("mask", b"")], "mask", "invalid_image"),
    ({"prompt": "7"}, [("image", picture()), ("mask", picture())], "mask", "invalid_image"),
    ({"prompt": "7"}, [("image", picture()), ("mask", picture("RGBA"))], "mask", "invalid_request"),
    ({"prompt": "7"}, [("image", picture()), ("mask", mask(30))], "mask", "invalid_request"),
]


def test_invalid_forms_are_refused_with_the_name_of_the_field() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        for parts, files, param, code in REFUSED_FORMS:
            assert error_of(await client.post(EDITS, **form(parts, files)), 400, code)["param"] == param

    run(check, FakeRunner())


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.full((28, 28), 255), "The mask has no transparent pixels. Transparent pixels mark the part to fill in"),
        (np.full((28, 28), 1), "The mask has no transparent pixels"),
        (np.zeros((28, 28)), "The mask is transparent everywhere. Use /v1/images/generations for a complete image"),
    ],
)
def test_mask_without_a_part_to_keep_or_to_fill_in_is_refused(pixels: np.ndarray, reason: str) -> None:
    alpha = pixels.astype(np.uint8)
    content = encode(Image.fromarray(np.dstack([alpha, alpha])))

    async def check(client: httpx.AsyncClient) -> None:
        error = error_of(await send_to(client, EDITS, mask=in_base64(content)), 400, "invalid_request")
        assert error["message"].startswith(f"mask: {reason}")

    run(check, FakeRunner())


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (b"--xx\r\n", "multipart/form-data; boundary=xx"),
        (b"", "multipart/form-data; boundary=xx"),
        (b"x", "multipart/form-data"),
        (b"--xx\r\nContent-Disposition: form-data\r\n\r\n", "multipart/form-data; boundary=xx"),
    ],
)
def test_damaged_multipart_is_refused_in_the_format_of_openai(content: bytes, content_type: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        response = await client.post(EDITS, content=content, headers={"Content-Type": content_type})
        error_of(response, 400, response.json()["error"]["code"])

    run(check, FakeRunner())


def test_edit_with_a_model_that_only_generates_is_refused() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        error = error_of(await send_to(client, EDITS, model="fast"), 400, "invalid_request")
        assert (error["param"], error["message"]) == (
            "model",
            "model: The model 'fast' does not support edits. Use 'default'",
        )

    run(check, FakeRunner(models={"default": INFO, "fast": FAST}))


@pytest.mark.parametrize(("field", "value"), [("size", "1024x1024"), ("model", "other"), ("n", 5)])
def test_values_of_an_edit_are_refused_before_its_pictures_are_decoded(field: str, value: Any) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        no_picture = in_base64(b"no picture")
        response = await send_to(client, EDITS, image=no_picture, mask=no_picture, **{field: value})
        assert error_of(response, 400, "invalid_request")["param"] == field

    run(check, FakeRunner(), max_count=4)


@both_paths
def test_seed_follows_from_the_idempotency_key(path: str) -> None:
    key = "9f1"
    body = {name: value for name, value in body_of(path).items() if name != "seed"}

    async def check(client: httpx.AsyncClient) -> None:
        response = await client.post(path, json=body, headers={"Idempotency-Key": key})
        assert int(response.headers["x-seed"]) == response.json()["seed"] == seed_of(key)
        assert (await client.post(path, json={**body, "seed": 3}, headers={"Idempotency-Key": key})).json()["seed"] == 3
        refused = await client.post(path, json=body, headers={"Idempotency-Key": "x" * 256})
        assert error_of(refused, 400, "invalid_request")["param"] == "Idempotency-Key"

    class Runner(FakeRunner):
        def read(self, values: list[Any]) -> Any:
            return super().read([np.zeros((28, 28), np.uint8) for _ in values])

    run(check, Runner())


@both_paths
def test_keys_and_rate_limits_apply(path: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        assert error_of(await send_to(client, path), 401, "unauthorized")["type"] == "authentication_error"
        client.headers["Authorization"] = "Bearer wrong"
        assert error_of(await send_to(client, path), 403, "forbidden")["type"] == "permission_error"
        client.headers["Authorization"] = f"Bearer {KEY}"
        assert [(await send_to(client, path)).status_code for _ in range(3)] == [200] * 3
        limited = await send_to(client, path)
        assert error_of(limited, 429, "rate_limited")["type"] == "rate_limit_error"
        assert int(limited.headers["retry-after"]) >= 1

    run(check, FakeRunner(), api_keys=KEY, rate_limit="3/hour")


@both_paths
def test_deadline_gives_504_that_the_clients_do_not_retry(path: str) -> None:
    gate = Gate()

    async def check(client: httpx.AsyncClient) -> None:
        response = await send_to(client, path)
        gate.released.set()
        error = error_of(response, 504, "deadline_exceeded")
        assert (error["type"], response.headers["x-should-retry"]) == ("server_error", "false")

    run(check, FakeRunner(on_step=gate), request_timeout=0.2)


@both_paths
def test_full_queue_gives_429_with_retry_after(path: str) -> None:
    gate = Gate()

    async def check(client: httpx.AsyncClient) -> None:
        running = [asyncio.ensure_future(send_to(client, path, n=2)) for _ in range(2)]
        await asyncio.to_thread(gate.entered.wait)
        refused = await send_to(client, path, n=2)
        gate.released.set()
        assert error_of(refused, 429, "overloaded")["type"] == "rate_limit_error"
        assert "retry-after" in refused.headers
        # One of the two requests is admitted. The other one may arrive while the first one still waits.
        assert 200 in {each.status_code for each in await asyncio.gather(*running)}

    run(check, FakeRunner(on_step=gate), queue_capacity=2, max_batch=1)


@both_paths
@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_cancels_the_images(path: str, stream: bool) -> None:
    gate = Gate()

    async def main() -> None:
        runner = FakeRunner(on_step=gate)
        app = create_app(Settings(), lambda: runner)
        engine = app.state.service.engine
        body = json.dumps(body_of(path, n=2, stream=stream)).encode()
        left = asyncio.Event()
        messages = iter([{"type": "http.request", "body": body}])

        async def receive() -> dict[str, Any]:
            message = next(messages, None)
            if message is None:
                await left.wait()
            return message or {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            pass

        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [],
            "client": ("192.0.2.1", 1),
        }
        async with app.router.lifespan_context(app):
            await asyncio.wrap_future(engine.ready)
            asking = asyncio.ensure_future(app(scope, receive, send))
            await asyncio.to_thread(gate.entered.wait)
            left.set()
            await asking
            gate.released.set()
            await asyncio.to_thread(wait_until, lambda: not any(engine.count_images()))
            assert len(runner.calls) <= 1

    asyncio.run(main())


@both_paths
def test_requests_and_images_are_counted_by_route(path: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        before = (await client.get("/metrics")).text
        assert f'unfog_requests_total{{code="504",route="{path}"}} 0.0' in before
        await send_to(client, path, n=2)
        await send_to(client, path, n=0)
        await client.get("/v1/models/default")
        after = (await client.get("/metrics")).text
        for line in (
            f'unfog_requests_total{{code="200",route="{path}"}} 1.0',
            f'unfog_requests_total{{code="400",route="{path}"}} 1.0',
            'unfog_requests_total{code="200",route="/v1/models/{model}"} 1.0',
            'unfog_images_total{digit="7",label="7"} 2.0',
        ):
            assert line in after

    run(check, FakeRunner())


def test_model_routes_have_the_served_models() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        client.headers["X-API-Key"] = KEY
        answer = (await client.get("/v1/models")).json()
        assert answer["object"] == "list"
        assert [model["id"] for model in answer["data"]] == ["default", "fast"]
        for model in answer["data"]:
            assert (model["object"], model["owned_by"]) == ("model", "unfog")
            assert abs(model["created"] - time.time()) < 60
            assert (await client.get(f"/v1/models/{model['id']}")).json() == model
        missing = await client.get("/v1/models/gpt-image-1")
        error = error_of(missing, 404, "not_found")
        assert error["message"] == "This model is not served. Use 'default' or 'fast'"
        del client.headers["X-API-Key"]
        for path in ("/v1/models", "/v1/models/default"):
            error_of(await client.get(path), 401, "unauthorized")

    run(check, FakeRunner(models={"default": INFO, "fast": FAST}), api_keys=KEY)


def test_routes_answer_503_while_the_service_starts() -> None:
    gate = Gate()

    async def main() -> None:
        app = create_app(Settings(), lambda: FakeRunner(on_warm_up=lambda stop: gate([])))
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://t") as client,
        ):
            await asyncio.to_thread(gate.entered.wait)
            responses = [await send_to(client, path) for path in PATHS]
            gate.released.set()
            await asyncio.wrap_future(app.state.service.engine.ready)
            for response in responses:
                assert error_of(response, 503, "starting")["type"] == "server_error"
                assert int(response.headers["retry-after"]) >= 1

    asyncio.run(main())


def test_preflight_permits_the_headers_of_the_client_of_openai() -> None:
    """The headers of openai 7.59 in a browser."""
    names = "authorization,content-type,openai-organization,openai-project,x-stainless-arch,x-stainless-lang,"
    names += "x-stainless-os,x-stainless-package-version,x-stainless-retry-count,x-stainless-runtime,"
    names += "x-stainless-runtime-version,x-stainless-timeout,user-agent,idempotency-key"
    headers = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": names}

    async def main() -> None:
        async with client_of(FakeRunner(), cors_origins=ORIGIN) as client:
            response = await client.options(GENERATIONS, headers=headers)
            assert response.status_code == 200, response.text
            answer = await client.post(GENERATIONS, json=body_of(GENERATIONS), headers={"Origin": ORIGIN})
            assert "X-Should-Retry" in answer.headers["access-control-expose-headers"]

    asyncio.run(main())


@both_paths
def test_other_methods_are_refused_in_the_format_of_openai(path: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        error_of(await client.get(path), 405, "method_not_allowed")
        error_of(await client.post(f"{path}/"), 404, "not_found")

    run(check, FakeRunner())
