"""Tests of the routes of the Open Inference Protocol with a runner whose images are known."""

import asyncio
import json
import logging
import struct
from dataclasses import replace
from typing import Any

import httpx
import pytest

from app.api.http.idempotency import seed_of
from app.engine.interface import Reading
from app.engine.job import ImageKey
from app.main import create_app
from app.settings import Settings
from tests.app.api.inference.bodies import INFER, LENGTH, assert_error, binary_body, binary_tensor, body_of, raw_of
from tests.app.application import run
from tests.app.fakes import INFO, WAIT_SECONDS, FakeRunner, Gate, Rows, image, wait_until

FAST = replace(INFO, name="fast", steps=(4, 2), samplers=("ddim",), guidable=False)
TWO_MODELS = {"default": INFO, "fast": FAST}
MAX_SEED = 2**53 - 1
STEPS = {"parameters": {"num_steps": 3}}


def outputs_of(response: httpx.Response) -> dict[str, list[int]]:
    """Returns the elements of the outputs of a JSON response."""
    assert response.status_code == 200, response.text
    return {each["name"]: each["data"] for each in response.json()["outputs"]}


def pixels_of(seeds: list[int], num_steps: int = 3) -> list[int]:
    """Returns the elements of the images that FakeRunner generates for these seeds."""
    return [int(pixel) for seed in seeds for pixel in image(seed, 0, num_steps).ravel()]


def image_rows(runner: FakeRunner) -> dict[int, tuple[int | None, tuple[int, int]]]:
    """Returns the digit and the noise key of each image of the job, by index."""
    return {row.index: (row.label, row.noise_key) for rows in runner.calls for row in rows}


# Inference


def test_every_class_of_a_model_with_more_than_ten_can_be_generated() -> None:
    runner = FakeRunner(models={"default": replace(INFO, class_names=tuple("0123456789ab"))})

    async def check(client: httpx.AsyncClient) -> None:
        body = body_of([11, 0], [1, 2], **STEPS)
        assert body["inputs"][0].pop("name") == "digit"
        body["inputs"][0]["name"] = "label"  # The classes are not digits.
        outputs_of(await client.post(INFER, json=body))

    run(check, runner)
    assert [digit for digit, _ in image_rows(runner).values()] == [11, 0]


def test_each_element_is_an_image_with_its_digit_and_seed_and_index_0() -> None:
    runner, seeds = FakeRunner(), [5, 300, 5, MAX_SEED]

    async def check(client: httpx.AsyncClient) -> None:
        response = await client.post(INFER, json=body_of([7, 0, 9, 7], seeds, **STEPS))
        assert outputs_of(response) == {"image": pixels_of(seeds), "seed": seeds}
        assert response.json()["model_name"] == "default"
        assert "id" not in response.json()
        assert "model_version" not in response.json()
        assert "x-seed" not in response.headers
        assert response.headers["server-timing"].startswith("queue;dur=")

    run(check, runner)
    assert image_rows(runner) == {i: (digit, (seeds[i], 0)) for i, digit in enumerate([7, 0, 9, 7])}
    assert len({row.job for rows in runner.calls for row in rows}) == 1


def test_options_of_the_request_apply_to_all_images() -> None:
    runner = FakeRunner(models=TWO_MODELS)
    parameters = {"num_steps": 7.0, "sampler": "dpmpp", "guidance_scale": 2, "timeout_seconds": 20}

    async def check(client: httpx.AsyncClient) -> None:
        response = await client.post(INFER, json=body_of([1, 2], [3, 4], parameters=parameters))
        assert outputs_of(response)["image"] == pixels_of([3, 4], 7)
        response = await client.post("/v2/models/fast/infer", json=body_of([1], [3]))
        assert outputs_of(response)["image"] == pixels_of([3], 4)
        assert response.json()["model_name"] == "fast"
        assert response.headers["x-seed"] == "3"

    run(check, runner)
    requests = {row.job.request for rows in runner.calls for row in rows}
    used = {(r.options.model, r.options.sampler, r.options.num_steps, r.options.guidance_scale) for r in requests}
    assert used == {("default", "dpmpp", 7, 2.0), ("fast", "ddim", 4, 1.0)}
    assert {r.timeout for r in requests} == {20, None}
    assert {r.images for r in requests} == {(ImageKey(1, 3, 0), ImageKey(2, 4, 0)), (ImageKey(1, 3, 0),)}


def test_absent_seeds_are_successive_and_returned() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        firsts = set()
        for _ in range(2):
            outputs = outputs_of(await client.post(INFER, json=body_of([1, 2, 3], **STEPS)))
            first = outputs["seed"][0]
            assert outputs["seed"] == [(first + i) % 2**53 for i in range(3)]
            assert outputs["image"] == pixels_of(outputs["seed"])
            firsts.add(first)
        assert len(firsts) == 2

    run(check, FakeRunner())


def test_idempotency_key_determines_the_absent_seeds() -> None:
    key = {"Idempotency-Key": "order-4711"}
    first = seed_of("order-4711")

    async def check(client: httpx.AsyncClient) -> None:
        outputs = outputs_of(await client.post(INFER, json=body_of([1, 2, 3]), headers=key))
        assert outputs["seed"] == [first, first + 1, first + 2]
        given = outputs_of(await client.post(INFER, json=body_of([1], [9]), headers=key))
        assert given["seed"] == [9]
        assert_error(await client.post(INFER, json=body_of([1]), headers={"Idempotency-Key": "k" * 256}), 400)

    run(check, FakeRunner())


def test_seeds_after_the_largest_one_start_at_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.api.inference.routes.seed_of", lambda key: MAX_SEED - 1)

    async def check(client: httpx.AsyncClient) -> None:
        response = await client.post(INFER, json=body_of([1, 2, 3]), headers={"Idempotency-Key": "a"})
        assert outputs_of(response)["seed"] == [MAX_SEED - 1, MAX_SEED, 0]

    run(check, FakeRunner())


@pytest.mark.parametrize("headers", [{}, {"content-type": "text/plain"}, {"content-type": "application/octet-stream"}])
@pytest.mark.parametrize("accept", ["image/png", "text/event-stream", "*/*"])
def test_content_type_and_accept_have_no_effect(headers: dict[str, str], accept: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        content = json.dumps(body_of([1], [2], **STEPS)).encode()
        response = await client.post(INFER, content=content, headers={**headers, "accept": accept})
        assert response.headers["content-type"] == "application/json"
        assert outputs_of(response)["image"] == pixels_of([2])

    run(check, FakeRunner())


def test_binary_inputs_and_outputs_equal_those_in_json() -> None:
    inputs = [binary_tensor("digit", 2), binary_tensor("seed", 2)]
    document = {"id": "a", "parameters": {"binary_data_output": True, "num_steps": 3}, "inputs": inputs}
    content, length = binary_body(document, raw_of([7, 8]), raw_of([300, 5]))

    async def check(client: httpx.AsyncClient) -> None:
        response = await client.post(INFER, content=content, headers={LENGTH: length})
        assert (response.status_code, response.headers["content-type"]) == (200, "application/octet-stream")
        end = int(response.headers[LENGTH])
        answer, raw = json.loads(response.content[:end]), response.content[end:]
        sizes = [each["parameters"]["binary_data_size"] for each in answer["outputs"]]
        assert (answer["id"], sizes, len(raw)) == ("a", [8, 16], 24)
        assert list(raw[:8]) == pixels_of([300, 5])
        assert struct.unpack("<2q", raw[8:]) == (300, 5)

    run(check, FakeRunner())


def test_colour_images_have_three_channels() -> None:
    class ColorRunner(FakeRunner):
        def read(self, values: list[Any]) -> Reading[list[Any]]:
            return super().read([each.reshape(2, 2, 1).repeat(3, axis=2) for each in values])

    async def check(client: httpx.AsyncClient) -> None:
        (output, _) = (await client.post(INFER, json=body_of([1, 2], [5, 300], **STEPS))).json()["outputs"]
        assert output["shape"] == [2, 2, 2, 3]
        assert output["data"] == [pixel for pixel in pixels_of([5, 300]) for _ in range(3)]

    run(check, ColorRunner())


REFUSED: list[tuple[dict[str, Any], str]] = [
    (body_of([10]), "body.inputs.0.data.0: Input should be from 0 to 9 for 'digit'"),
    (body_of([1, 9, 10]), "body.inputs.0.data.2"),
    (body_of([1], [2**53]), "body.inputs.1.data.0: Input should be from 0 to 9007199254740991 for 'seed'"),
    (body_of([1] * 65), "less than or equal to 64"),
    (body_of([]), "body.inputs.0.shape.0"),
    (
        body_of([1], parameters={"timeout_seconds": 601}),
        "body.parameters.timeout_seconds: Input should be less than or equal to 600",
    ),
    (body_of([1], parameters={"timeout_seconds": 0}), "parameters.timeout_seconds"),
    (body_of([1], parameters={"count": 2}), "parameters.count"),
    (body_of([1], parameters={"sampler": "euler"}), "parameters.sampler"),
]


@pytest.mark.parametrize(("body", "message"), REFUSED)
def test_invalid_request_is_400_and_starts_no_image(body: dict[str, Any], message: str) -> None:
    runner = FakeRunner()

    async def check(client: httpx.AsyncClient) -> None:
        assert_error(await client.post(INFER, json=body), 400, message)

    run(check, runner)
    assert runner.calls == []


def test_values_that_the_model_does_not_support_are_400() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        assert_error(await client.post(INFER, json=body_of([4, 5])), 400, "Input should be from 0 to 4")
        path = "/v2/models/fast/infer"
        for parameters, text in (({"num_steps": 5}, "num_steps"), ({"sampler": "ddpm"}, "sampler")):
            response = await client.post(path, json=body_of([1], parameters=parameters))
            assert_error(response, 400, f"body.parameters.{text}: Input should be")

    run(check, FakeRunner(models={"default": replace(INFO, class_names=tuple("01234")), "fast": FAST}))


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "x"])
def test_compressed_body_is_400(encoding: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        response = await client.post(INFER, json=body_of([1]), headers={"content-encoding": encoding})
        assert_error(response, 400, "Compressed bodies are not supported")
        response = await client.post(INFER, json=body_of([1]), headers={"content-encoding": "identity"})
        assert response.status_code == 200

    run(check, FakeRunner())


@pytest.mark.parametrize("length", [b"", b"a", b"-1", b"1e2", b"\xb2", b"99999999999999999999"])
def test_invalid_length_header_is_400(length: bytes) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        headers = [(LENGTH.lower().encode(), length)]
        assert_error(await client.post(INFER, json=body_of([1]), headers=headers), 400, "Inference-Header")

    run(check, FakeRunner())


def test_repeated_length_header_is_400() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        content = json.dumps(body_of([1])).encode()
        headers = [(LENGTH, str(len(content))), (LENGTH, "2")]  # A proxy could use the other value.
        assert_error(await client.post(INFER, content=content, headers=headers), 400, "more than once")

    run(check, FakeRunner())


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 5000, b'{"inputs": ' + b"[" * 5000, b"7" * 5000])
def test_malformed_json_is_400(content: bytes) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        assert_error(await client.post(INFER, content=content), 400)

    run(check, FakeRunner())


def test_body_over_the_limit_is_413() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        assert_error(await client.post(INFER, content=b"[" * 20_000), 413, "The body exceeds the limit of 16384 bytes")

    run(check, FakeRunner())


def test_limits_follow_the_settings() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        assert (await client.post(INFER, json=body_of([1] * 3))).status_code == 200
        assert_error(await client.post(INFER, json=body_of([1] * 4)), 400, "less than or equal to 3")
        assert_error(await client.post(INFER, json=body_of([1], parameters={"timeout_seconds": 6})), 400, "equal to 5")

    run(check, FakeRunner(), max_count=3, request_timeout=5)


# Admission, deadline and cancellation


def test_request_is_admitted_as_a_whole_or_refused_with_429() -> None:
    gate = Gate()

    async def check(client: httpx.AsyncClient) -> None:
        try:
            first = asyncio.ensure_future(client.post(INFER, json=body_of([1] * 3)))
            await asyncio.to_thread(gate.entered.wait, WAIT_SECONDS)
            refused = await client.post(INFER, json=body_of([3, 4]))  # two images wait, so there is room for one
            assert_error(refused, 429, "The queue has no room")
            assert int(refused.headers["retry-after"]) >= 1
            second = asyncio.ensure_future(client.post(INFER, json=body_of([3])))
        finally:
            gate.released.set()
        assert [(await each).status_code for each in (first, second)] == [200, 200]

    run(check, FakeRunner(on_step=gate), queue_capacity=3, max_batch=1)


def test_deadline_is_504() -> None:
    gate = Gate()

    async def check(client: httpx.AsyncClient) -> None:
        try:
            response = await client.post(INFER, json=body_of([1, 2], parameters={"timeout_seconds": 0.05}))
            assert_error(response, 504, "The images were not finished before the deadline")
        finally:
            gate.released.set()

    run(check, FakeRunner(on_step=gate))


def test_failed_row_fails_the_whole_request_without_details() -> None:
    def fail(rows: Rows) -> None:
        if any(row.noise_key[0] == 13 for row in rows):
            raise KeyError("secret")

    async def check(client: httpx.AsyncClient) -> None:
        response = await client.post(INFER, json=body_of([1, 2], [1, 13]))
        assert_error(response, 500, "Internal error")
        assert "secret" not in response.text
        assert (await client.post(INFER, json=body_of([1], [1]))).status_code == 200

    run(check, FakeRunner(on_step=fail))


def test_client_that_disconnects_cancels_all_images_of_its_request() -> None:
    gate, runner = Gate(), FakeRunner()
    runner.on_step = gate
    app = create_app(Settings(), lambda: runner)

    async def main() -> None:
        async with app.router.lifespan_context(app):
            engine = app.state.service.engine
            await asyncio.wrap_future(engine.ready)
            body, gone = json.dumps(body_of([1, 2, 3])).encode(), asyncio.Event()
            messages = [{"type": "http.request", "body": body}]

            async def receive() -> dict[str, Any]:
                if messages:
                    return messages.pop()
                await gone.wait()
                return {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                pass

            scope = {
                "type": "http",
                "method": "POST",
                "path": INFER,
                "raw_path": INFER.encode(),
                "query_string": b"",
                "headers": [(b"host", b"a")],
                "client": ("127.0.0.1", 1),
                "server": ("a", 80),
                "scheme": "http",
                "root_path": "",
                "http_version": "1.1",
                "asgi": {"version": "3.0"},
            }
            running = asyncio.ensure_future(app(scope, receive, send))
            await asyncio.to_thread(gate.entered.wait, WAIT_SECONDS)
            gone.set()
            await running
            gate.released.set()
            await asyncio.to_thread(wait_until, lambda: not any(engine.count_images()) and not runner.held)

    asyncio.run(main())


# Log and metrics


@pytest.mark.parametrize(
    ("digits", "seeds", "expected"),
    [([3, 4], [1, 2], (None, None)), ([3, 3], [1, 2], (3, None)), ([3, 4], [1, 1], (None, 1)), ([3], [1], (3, 1))],
)
def test_digit_and_seed_are_null_in_the_access_log_if_they_differ(
    caplog: pytest.LogCaptureFixture, digits: list[int], seeds: list[int], expected: tuple[int | None, int | None]
) -> None:
    caplog.set_level(logging.INFO)

    async def check(client: httpx.AsyncClient) -> None:
        await client.post(INFER, json=body_of(digits, seeds, **STEPS))

    run(check, FakeRunner())
    (line,) = [vars(record) for record in caplog.records if record.name == "unfog.access"]
    assert (line["digit"], line["seed"]) == expected
    assert (line["route"], line["count"]) == ("/v2/models/{name}/infer", len(digits))
    assert (line["model"], line["num_steps"], line["outcome"]) == ("default", 3, "ok")


def test_images_are_counted_by_digit() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        await client.post(INFER, json=body_of([3, 4, 3]))
        metrics = (await client.get("/metrics")).text
        assert 'unfog_images_total{digit="3",label="3"} 2.0' in metrics
        assert 'unfog_images_total{digit="4",label="4"} 1.0' in metrics

    run(check, FakeRunner())
