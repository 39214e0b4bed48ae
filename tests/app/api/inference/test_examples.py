"""Tests of the schemas and examples of the Open Inference Protocol: the service's document and the protocol's own."""

import json
from typing import Any

import httpx
import pytest
import yaml
from jsonschema import Draft202012Validator

from app.api.inference.routes import REQUESTS
from app.main import create_app
from app.settings import Settings
from tests.app.api.inference.bodies import INFER, LENGTH, PROTOCOL, body_of, tensor
from tests.app.application import run
from tests.app.fakes import FakeRunner


def is_valid(document: dict[str, Any], schema: str, instance: Any) -> bool:
    whole = {"$ref": f"#/components/schemas/{schema}", "components": document["components"]}
    return bool(Draft202012Validator(whole).is_valid(instance))


def test_responses_match_the_schemas_of_the_protocol() -> None:
    document = yaml.safe_load(PROTOCOL.read_text())
    outputs = [None, [], [{"name": "seed"}], [{"name": "image"}, {"name": "seed"}]]

    async def check(client: httpx.AsyncClient) -> None:
        assert is_valid(document, "metadata_server_response", (await client.get("/v2")).json())
        assert is_valid(document, "metadata_model_response", (await client.get("/v2/models/default")).json())
        for wanted in outputs:
            for fields in ({}, {"id": "42"}):
                body = body_of([1, 2], [3, 4], **fields, **({"outputs": wanted} if wanted is not None else {}))
                assert is_valid(document, "inference_request", body)
                response = await client.post(INFER, json=body)
                assert response.status_code == 200
                assert is_valid(document, "inference_response", response.json())
        for response in (await client.post(INFER, json={}), await client.get("/v2/models/none")):
            assert isinstance(response.json()["error"], str)

    run(check, FakeRunner())


@pytest.mark.parametrize("name", REQUESTS)
def test_service_accepts_the_request_examples_of_its_document(name: str) -> None:
    body = REQUESTS[name][1]

    async def check(client: httpx.AsyncClient) -> None:
        served = (await client.get("/openapi.json")).json()
        assert is_valid(served, "InferenceRequest", body)
        response = await client.post(INFER, json=body)
        assert response.status_code == 200
        end = int(response.headers.get(LENGTH, len(response.content)))
        assert is_valid(served, "InferenceResponse", json.loads(response.content[:end]))

    run(check, FakeRunner())


@pytest.mark.parametrize(
    ("body", "valid"),
    [
        (body_of([1], [2], id="a", model_name="default", model_version="1"), True),
        (body_of([1], parameters={"num_steps": 1, "sampler": "ddim", "guidance_scale": 2, "timeout_seconds": 1}), True),
        (body_of([1], parameters={"num_steps": 0}), False),
        (body_of([1], parameters={"timeout_seconds": 601}), False),
        (body_of([1] * 65), False),
        (body_of([1], other=1), False),
        ({"inputs": [{**tensor("digit", [1]), "datatype": "FP32"}]}, False),
        ({"inputs": []}, False),
        (body_of([1], outputs=[{"name": "logits"}]), False),
    ],
)
def test_document_permits_what_the_service_accepts(body: dict[str, Any], valid: bool) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        served = (await client.get("/openapi.json")).json()
        assert is_valid(served, "InferenceRequest", body) is valid
        assert (await client.post(INFER, json=body)).status_code == (200 if valid else 400)

    run(check, FakeRunner())


def test_every_error_of_infer_has_an_example_in_the_document() -> None:
    responses = create_app(Settings()).openapi()["paths"]["/v2/models/{name}/infer"]["post"]["responses"]
    refused = {"400", "401", "403", "404", "408", "413", "429", "431", "500", "503", "504"}
    assert set(responses) == refused | {"200"}
    # The HTTP server sends this error without the routes, as a problem document.
    assert set(responses["431"]["content"]) == {"application/problem+json"}
    for status in refused - {"431"}:
        (content,) = responses[status]["content"].values()
        assert content["schema"] == {"$ref": "#/components/schemas/InferenceError"}
        for code, example in content["examples"].items():
            assert code in responses[status]["description"]
            assert list(example["value"]) == ["error"]
    assert {*responses["400"]["content"]["application/json"]["examples"]} == {
        "malformed_json",
        "malformed_request",
        "invalid_request",
    }
