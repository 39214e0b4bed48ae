"""The OpenAI Images API in the OpenAPI document."""

from functools import cache
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from app.api.operations import FILE
from app.main import create_app
from app.settings import Settings
from tests.app.api.openai.samples import EDITS, GENERATIONS, PATHS, body_of, events_of, send
from tests.app.application import run
from tests.app.fakes import FakeRunner

MODELS = ("/v1/models", "/v1/models/{model}")
REQUESTS = {"/v1/images/generations": "ImageGenerationRequest", "/v1/images/edits": "ImageEditRequest"}  # schemas


@cache
def document(**settings: Any) -> dict[str, Any]:
    return create_app(Settings(**settings)).openapi()


def is_valid(document: dict[str, Any], schema: dict[str, Any], instance: Any) -> bool:
    return bool(Draft202012Validator({**schema, "components": document["components"]}).is_valid(instance))


def request_schema(path: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{REQUESTS[path]}"}


@pytest.mark.parametrize("path", [*PATHS, *MODELS])
def test_errors_have_the_format_of_openai_and_an_example_of_every_code(path: str) -> None:
    served = document()
    (operation,) = served["paths"][path].values()
    assert operation["security"] == [{}, {"bearer": []}, {"header": []}]
    refused = {"401", "403", "429", "500", "503"}
    refused |= {"400", "408", "413", "431", "504"} if path in PATHS else set()
    refused |= {"404"} if path == MODELS[1] else set()
    assert set(operation["responses"]) == refused | {"200"}
    codes = set()
    for status in refused - {"431"}:  # The HTTP server sends this error, before it knows the path.
        (content,) = operation["responses"][status]["content"].items()
        assert content[0] == "application/json"
        assert content[1]["schema"] == {"$ref": "#/components/schemas/OpenAIError"}
        for code, example in content[1]["examples"].items():
            assert is_valid(served, content[1]["schema"], example["value"])
            assert example["value"]["error"]["code"] == code
            assert code in operation["responses"][status]["description"]
            codes.add(code)
    expected = {"unauthorized", "forbidden", "rate_limited", "internal_error", "starting", "draining", "engine_failed"}
    if path in PATHS:
        expected |= {"malformed_json", "malformed_request", "invalid_request", "request_timeout", "body_too_large"}
        expected |= {"overloaded", "deadline_exceeded"} | ({"invalid_image"} if path == EDITS else set())
    assert codes == expected | ({"not_found"} if path == MODELS[1] else set())


def test_document_has_no_schemas_of_the_errors_of_the_framework() -> None:
    assert not {"HTTPValidationError", "ValidationError"} & set(document()["components"]["schemas"])


@pytest.mark.parametrize("path", PATHS)
def test_service_accepts_the_examples_and_its_answers_match_the_schemas(path: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        served = (await client.get("/openapi.json")).json()
        operation = served["paths"][path]["post"]
        examples = operation["requestBody"]["content"]["application/json"]["examples"].values()
        answer = operation["responses"]["200"]["content"]["application/json"]["schema"]
        for example in examples:
            assert is_valid(served, request_schema(path), example["value"])
            response = await client.post(path, json={**example["value"], "seed": 1})
            assert response.status_code == 200, response.text
            assert is_valid(served, answer, response.json())
        item = operation["responses"]["200"]["content"]["text/event-stream"]["x-itemSchema"]
        kinds = {
            kind["title"]: kind["properties"]["data"]["contentSchema"]
            for kind in served["components"]["schemas"][item["$ref"].rpartition("/")[2]]["oneOf"]
        }
        streamed = events_of(await send(client, path, stream=True, partial_images=1))
        assert [*dict(streamed), "error"] == list(kinds)
        for name, data in streamed:
            assert is_valid(served, kinds[name], data)
            assert set(data) == set(
                served["components"]["schemas"][kinds[name]["$ref"].rpartition("/")[2]]["properties"]
            )

    run(check, FakeRunner())


@pytest.mark.parametrize("path", PATHS)
def test_examples_of_responses_are_valid(path: str) -> None:
    served = document()
    content = served["paths"][path]["post"]["responses"]["200"]["content"]
    assert is_valid(served, content["application/json"]["schema"], content["application/json"]["example"])
    names = [name for name, _ in events_of(stream_response(content["text/event-stream"]["example"]))]
    kind = "image_edit" if path == EDITS else "image_generation"
    assert names == [f"{kind}.partial_image", f"{kind}.completed"]


def stream_response(text: str) -> httpx.Response:
    return httpx.Response(200, text=text, headers={"content-type": "text/event-stream"})


CHANGES: list[tuple[dict[str, Any], bool]] = [
    ({}, True),
    ({"n": None, "size": None, "seed": None, "model": None, "quality": None, "stream": None}, True),
    ({"n": 10, "size": "448x448", "partial_images": 3, "seed": 2**53 - 1}, True),
    ({"n": 11}, False),
    ({"size": "300x300"}, False),
    ({"size": "auto"}, True),
    ({"model": "gpt-image-2"}, True),
    ({"model": "gpt-4o"}, False),
    ({"quality": "hd"}, True),
    ({"quality": "best"}, False),
    ({"response_format": "url"}, False),
    ({"background": "transparent"}, False),
    ({"frame_count": 2}, False),
    ({"user": [1]}, True),
    ({"unknown": 1}, False),
    ({"markup": "x"}, False),
    ({"svg": {}}, False),
    ({"prompt": None}, False),
]


@pytest.mark.parametrize("path", PATHS)
def test_service_accepts_exactly_the_requests_that_its_document_permits(path: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        served = (await client.get("/openapi.json")).json()
        for change, expected in CHANGES:
            body = body_of(path, **change)
            assert is_valid(served, request_schema(path), body) is expected, change
            body |= {"seed": 1} if change.get("seed") is None else {}  # the fake runner supports small seeds
            if change.get("seed", 0) != 2**53 - 1:
                assert ((await client.post(path, json=body)).status_code == 200) is expected, change

    run(check, FakeRunner())


def test_document_has_the_limits_of_the_settings_and_of_the_models() -> None:
    schemas = document(max_count=4)["components"]["schemas"]
    for path, names in ((GENERATIONS, ["default", "fast"]), (EDITS, ["default"])):
        fields = schemas[REQUESTS[path]]["properties"]
        assert fields["n"]["anyOf"][0]["maximum"] == 4
        assert fields["model"]["anyOf"][0]["anyOf"][0]["enum"] == names


def test_multipart_body_has_the_same_fields_with_files() -> None:
    served = document()
    content = served["paths"][EDITS]["post"]["requestBody"]["content"]
    assert list(content) == ["application/json", "multipart/form-data"]
    schemas = served["components"]["schemas"]
    body, form = schemas["ImageEditRequest"]["properties"], schemas["ImageEditRequestForm"]["properties"]
    assert set(body) == set(form)
    for name, field in form.items():
        assert (field.get("contentMediaType") == "application/octet-stream") == (name in ("image", "mask"))
        assert "anyOf" not in field or name == "model"
    for example in content["multipart/form-data"]["examples"].values():
        assert {example["value"][name] for name in ("image", "mask") if name in example["value"]} == {FILE}
