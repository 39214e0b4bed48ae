"""The OpenAI Images API, called by the unmodified clients of OpenAI for Python and JavaScript."""

import asyncio
import base64
import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.image_edit_completed_event import ImageEditCompletedEvent
from openai.types.image_edit_partial_image_event import ImageEditPartialImageEvent
from openai.types.image_gen_completed_event import ImageGenCompletedEvent
from openai.types.image_gen_partial_image_event import ImageGenPartialImageEvent

from tests.app.api.openai.samples import mask
from tests.e2e.conftest import start_service
from tests.e2e.faulty_service import fault_seed
from tests.e2e.picture_requests import IMAGE, SIZE, Ask, encode
from tests.e2e.service import INTERNAL_DETAILS, Service, open_png, pngs

KEYS = [f"a-key-of-some-length-{number}" for number in range(5)]
MASK = mask()
WHITE = 255 * (open_png(MASK)[0][..., 1] == 0)  # the same mask as /inpaint expects it
COMMON: dict[str, Any] = {"n": 2, "size": "56x56", "quality": "medium", "extra_body": {"seed": 5}}
OWN = {"digit": 7, "count": 2, "scale": 2, "seed": 5}  # the same fields of the other routes
MEDIUM = {"num_steps": 10, "sampler": "dpmpp"}
LONG: dict[str, Any] = {"prompt": "7", "n": 10}


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[openai.OpenAI]:
    with Caller(service) as client:
        yield client


@pytest.fixture(scope="module")
def limited(checkpoint: Path) -> Iterator[Service]:
    """A service with keys, each of which permits one request a second."""
    with ExitStack() as stack:
        module, keys = "tests.e2e.faulty_service", ",".join(KEYS)
        yield start_service(stack, checkpoint, module, UNFOG_API_KEYS=keys, UNFOG_RATE_LIMIT="1/second")


@pytest.fixture(scope="module")
def slow(checkpoint: Path) -> Iterator[Service]:
    """A service whose deadline is too short for LONG."""
    with ExitStack() as stack:
        yield start_service(stack, checkpoint, "tests.e2e.faulty_service", UNFOG_REQUEST_TIMEOUT="0.02")


@dataclass
class Caller:
    """A client that counts its responses."""

    service: Service
    key: str = "not-checked"
    max_retries: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    statuses: list[int] = field(default_factory=list)  # of all responses

    def __enter__(self) -> openai.OpenAI:
        http = httpx.Client(event_hooks={"response": [lambda response: self.statuses.append(response.status_code)]})
        self._client = openai.OpenAI(
            base_url=f"{self.service.url}/v1",
            api_key=self.key,
            max_retries=self.max_retries,
            default_headers=self.headers,
            http_client=http,
        )
        return self._client

    def __exit__(self, *arguments: object) -> None:
        self._client.close()


def images(data: Any) -> list[bytes]:
    return [base64.b64decode(each.b64_json, validate=True) for each in data]


def test_generated_images_equal_those_of_generate(client: openai.OpenAI, service: Service) -> None:
    answer = client.images.generate(prompt="a handwritten seven, please", **COMMON)
    assert images(answer.data) == service.images(**OWN, **MEDIUM)
    assert (answer.size, answer.quality, answer.background, answer.output_format) == (
        "56x56",
        "medium",
        "opaque",
        "png",
    )
    assert answer.usage is not None
    assert answer.usage.total_tokens == 0
    assert answer.data is not None
    assert answer.data[0].revised_prompt == "A handwritten digit seven"
    assert answer.model_extra is not None
    assert (answer.model_extra["seed"], answer.model_extra["model"]) == (5, "default")


def test_options_of_openai_are_accepted(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        prompt="SEVEN!",
        model="gpt-image-2",
        background="auto",
        moderation="low",
        output_compression=90,
        output_format="png",
        response_format="b64_json",
        quality="hd",
        size="auto",
        style="vivid",
        user="somebody",
        n=None,
    )
    (png,) = images(answer.data)
    assert open_png(png)[0].shape == (280, 280)
    assert open_png(png)[1]["Steps"] == "100"


@pytest.mark.parametrize("form", ["bytes", "tuple", "list"])
def test_edited_images_equal_those_of_edit(client: openai.OpenAI, service: Service, form: str) -> None:
    forms: dict[str, Any] = {"bytes": IMAGE, "tuple": ("seven.png", IMAGE, "image/png"), "list": [IMAGE]}
    answer = client.images.edit(prompt="7", image=forms[form], **COMMON)
    expected = Ask("/edit", {**OWN, **MEDIUM}).send(service)
    assert images(answer.data) == pngs(expected)
    assert answer.quality == "medium"


def test_filled_images_equal_those_of_inpaint(client: openai.OpenAI, service: Service) -> None:
    answer = client.images.edit(prompt="7", image=IMAGE, mask=MASK, **COMMON)
    expected = Ask("/inpaint", OWN, {"image": IMAGE, "mask": encode(WHITE.astype("uint8"))}).send(service)
    assert images(answer.data) == pngs(expected)
    kept = open_png(images(answer.data)[0])[0][:SIZE]  # the upper half, enlarged twice
    assert (kept == open_png(IMAGE)[0][: SIZE // 2].repeat(2, 0).repeat(2, 1)).all()


def test_stream_of_a_generation_has_typed_events(client: openai.OpenAI) -> None:
    expected = images(client.images.generate(prompt="7", **COMMON).data)
    with client.images.generate(prompt="7", stream=True, partial_images=3, **COMMON) as stream:
        events = list(stream)
    partial = [event for event in events if isinstance(event, ImageGenPartialImageEvent)]
    completed = [event for event in events if isinstance(event, ImageGenCompletedEvent)]
    assert len(partial) + len(completed) == len(events)
    check_events(partial, completed, expected, 3)


def test_stream_of_an_edit_has_typed_events(client: openai.OpenAI) -> None:
    expected = images(client.images.edit(prompt="7", image=IMAGE, mask=MASK, **COMMON).data)
    with client.images.edit(prompt="7", image=IMAGE, mask=MASK, stream=True, partial_images=2, **COMMON) as stream:
        events = list(stream)
    partial = [event for event in events if isinstance(event, ImageEditPartialImageEvent)]
    completed = [event for event in events if isinstance(event, ImageEditCompletedEvent)]
    assert len(partial) + len(completed) == len(events)
    check_events(partial, completed, expected, 2)


def check_events(partial: list[Any], completed: list[Any], expected: list[bytes], num_partial: int) -> None:
    assert {event.index: base64.b64decode(event.b64_json) for event in completed} == dict(enumerate(expected))
    for index in range(len(expected)):
        numbers = [event.partial_image_index for event in partial if event.index == index]
        assert numbers == list(range(num_partial))
    for event in (*partial, *completed):
        assert (event.seed, event.size) == (5, "56x56")
        assert open_png(base64.b64decode(event.b64_json))[0].shape == (56, 56)
    assert {event.usage.total_tokens for event in completed} == {0}


def test_asynchronous_client_gets_the_same_images(client: openai.OpenAI, service: Service) -> None:
    async def ask() -> list[bytes]:
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="not-checked") as asynchronous:
            return images((await asynchronous.images.generate(prompt="7", **COMMON)).data)

    assert asyncio.run(ask()) == images(client.images.generate(prompt="7", **COMMON).data)


def test_models_are_listed(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == ("default", "unfog")
    assert client.models.retrieve("default") == model
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("gpt-image-1")
    assert refused.value.code == "not_found"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "a cat"}, "prompt"),
        ({"prompt": "7 and 8"}, "prompt"),
        ({"size": "1024x1024"}, "size"),
        ({"n": 11}, "n"),
        ({"response_format": "url"}, "response_format"),
        ({"output_format": "webp"}, "output_format"),
        ({"background": "transparent"}, "background"),
        ({"model": "gpt-4o"}, "model"),
        ({"extra_body": {"unknown": 1}}, "unknown"),
    ],
)
def test_bad_request_error_names_the_parameter(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(**{"prompt": "7", **fields})
    error = refused.value
    assert (error.param, error.code, error.type) == (param, "invalid_request", "invalid_request_error")
    assert not INTERNAL_DETAILS.search(error.response.text)


def test_bad_request_error_of_an_edit_names_the_picture(client: openai.OpenAI) -> None:
    for fields, param in (({"image": b"x"}, "image"), ({"image": IMAGE, "mask": IMAGE}, "mask")):
        with pytest.raises(openai.BadRequestError) as refused:
            client.images.edit(prompt="7", **fields)
        assert (refused.value.param, refused.value.code) == (param, "invalid_image")
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.edit(prompt="7", image=[IMAGE, IMAGE])
    assert refused.value.param == "image"


def test_missing_and_wrong_keys_raise_their_errors(limited: Service) -> None:
    no_key = {"Authorization": "Basic eA=="}  # the client cannot send a request without this header
    with pytest.raises(openai.AuthenticationError) as missing, Caller(limited, headers=no_key, max_retries=2) as client:
        client.images.generate(prompt="7")
    assert missing.value.code == "unauthorized"
    with pytest.raises(openai.PermissionDeniedError) as wrong, Caller(limited, "wrong", max_retries=2) as client:
        client.images.generate(prompt="7")  # The first answer can be 429, because the last request counts too.
    assert wrong.value.code == "forbidden"


def test_rate_limit_error_is_raised_without_retries(limited: Service) -> None:
    caller = Caller(limited, KEYS[0])
    with pytest.raises(openai.RateLimitError) as refused, caller as client:
        for _ in range(20):
            client.models.list()
    assert refused.value.code == "rate_limited"
    assert caller.statuses[-1] == 429


def test_client_waits_for_retry_after_and_then_succeeds(limited: Service) -> None:
    caller = Caller(limited, KEYS[1], max_retries=2)
    with caller as client:
        client.models.list()
        answer = client.images.generate(prompt="7", quality="medium")
    assert len(images(answer.data)) == 1
    assert caller.statuses in ([200, 429, 200], [200, 200])  # the second one if the first answer took a second


def test_bug_in_the_service_raises_internal_server_error(limited: Service) -> None:
    with pytest.raises(openai.InternalServerError) as failed, Caller(limited, KEYS[2]) as client:
        client.images.generate(prompt="7", extra_body={"seed": fault_seed("exception", 30)})
    assert (failed.value.status_code, failed.value.code) == (500, "internal_error")
    assert not INTERNAL_DETAILS.search(failed.value.response.text)


def test_deadline_is_not_retried(slow: Service) -> None:
    caller = Caller(slow, max_retries=2)
    with pytest.raises(openai.InternalServerError) as failed, caller as client:
        client.images.generate(**LONG)
    assert (failed.value.status_code, failed.value.code) == (504, "deadline_exceeded")
    assert caller.statuses == [504]


def test_error_in_a_stream_raises_api_error(slow: Service) -> None:
    with (
        pytest.raises(openai.APIError) as failed,
        Caller(slow) as client,
        client.images.generate(**LONG, stream=True) as stream,
    ):
        list(stream)
    assert (failed.value.code, failed.value.type) == ("deadline_exceeded", "server_error")


def test_javascript_client_gets_the_same_images_and_errors(
    client: openai.OpenAI, service: Service, limited: Service, slow: Service, node_modules: Path
) -> None:
    (node_modules / "image.png").write_bytes(IMAGE)
    (node_modules / "mask.png").write_bytes(MASK)
    asked = {
        "url": service.url,
        "image": "image.png",
        "mask": "mask.png",
        "limitedUrl": limited.url,
        "key": KEYS[3],
        "slowUrl": slow.url,
    }
    command = ["node", "openai_client.js", json.dumps(asked)]
    done = subprocess.run(command, cwd=node_modules, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["models"] == ["default"]
    generated = images(client.images.generate(prompt="7", **COMMON).data)
    edited = images(client.images.edit(prompt="7", image=IMAGE, **COMMON).data)
    filled = images(client.images.edit(prompt="7", image=IMAGE, mask=MASK, **COMMON).data)
    for name, expected in (("generated", generated), ("edited", edited), ("several", edited), ("filled", filled)):
        assert [base64.b64decode(each["b64_json"]) for each in found[name]["data"]] == expected, name
        assert (found[name]["seed"], found[name]["usage"]["total_tokens"]) == (5, 0)
    for name, kind, num_partial, expected in (
        ("generationEvents", "image_generation", 2, generated),
        ("editEvents", "image_edit", 1, edited),
    ):
        types = [event["type"] for event in found[name]]
        assert types.count(f"{kind}.partial_image") == 2 * num_partial
        completed = [event for event in found[name] if event["type"] == f"{kind}.completed"]
        assert {event["index"]: base64.b64decode(event["b64_json"]) for event in completed} == dict(enumerate(expected))
        assert len(types) == 2 * num_partial + 2
    assert {name: error["name"] for name, error in found["errors"].items()} == {
        "prompt": "BadRequestError",
        "size": "BadRequestError",
        "image": "BadRequestError",
        "model": "NotFoundError",
        "key": "PermissionDeniedError",
        "timeout": "InternalServerError",
        "stream": "APIError",
    }
    assert {name: found["errors"][name]["param"] for name in ("prompt", "size", "image")} == {
        name: name for name in ("prompt", "size", "image")
    }
    assert {name: found["errors"][name]["code"] for name in ("timeout", "stream")} == {
        "timeout": "deadline_exceeded",
        "stream": "deadline_exceeded",
    }
    assert {error["numRequests"] for error in found["errors"].values()} == {1}  # none of them is retried
    assert found["retried"]["images"] == 1
    assert found["retried"]["numRequests"] in (1, 2)


def test_failed_engine_raises_internal_server_error(limited: Service) -> None:
    """This test must be the last one, because the service ends."""
    with pytest.raises(openai.InternalServerError) as failed, Caller(limited, KEYS[4]) as client:
        client.images.generate(prompt="7", extra_body={"seed": fault_seed("lost", 1)})
    assert (failed.value.status_code, failed.value.code) == (503, "engine_failed")
    assert int(failed.value.response.headers["retry-after"]) >= 1
