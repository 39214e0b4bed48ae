"""Tests that the OpenAPI document is complete and correct, and that its examples work."""

import base64
import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from PIL import Image

from app.api.native.generate import LABELS_ALONE, NEEDS_A_CLASS, PROMPT_NEEDS_A_SCALE, QUALITY_ALONE
from app.api.native.operations import ONE_CLASS
from app.api.operations import FILE
from app.engine.interface import ModelInfo
from app.main import create_app
from app.settings import Settings
from model.schedule import Schedule, ScheduleConfig
from tests.app.api.examples import GENERATING, PICTURE_TASKS
from tests.app.application import run
from tests.app.fakes import INFO, FakeRunner
from tests.app.test_errors import EVERY_ERROR

POST_PATHS = ["/generate", *PICTURE_TASKS, "/reproduce", "/score"]
INFERENCE_IDS = {
    "/v2": "get_inference_server",
    "/v2/health/live": "get_inference_liveness",
    "/v2/health/ready": "get_inference_readiness",
    "/v2/models/{name}": "get_inference_model",
    "/v2/models/{name}/ready": "get_inference_model_readiness",
    "/v2/models/{name}/infer": "infer",
}
OPENAI_PATHS = {  # path -> operation id
    "/v1/images/generations": "create_images",
    "/v1/images/edits": "edit_images",
    "/v1/models": "list_models",
    "/v1/models/{model}": "get_model",
}
BATCH_IDS = {  # path -> operation ids by method
    "/v1/files": {"post": "create_file", "get": "list_files"},
    "/v1/files/{file}": {"get": "get_file", "delete": "delete_file"},
    "/v1/files/{file}/content": {"get": "get_file_content"},
    "/v1/batches": {"post": "create_batch", "get": "list_batches"},
    "/v1/batches/{batch}": {"get": "get_batch"},
    "/v1/batches/{batch}/cancel": {"post": "cancel_batch"},
    "/batches/{batch}/images.zip": {"get": "get_batch_zip"},
    "/batches/{batch}/images.parquet": {"get": "get_batch_parquet"},
}
COMMITTED = Path(__file__).parents[3] / "docs" / "openapi.json"


def document() -> dict[str, Any]:
    return create_app(Settings()).openapi()


def references(node: Any) -> set[str]:
    """Returns every $ref within a node."""
    if isinstance(node, dict):
        found = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return found.union(*map(references, node.values()))
    return set().union(*map(references, node)) if isinstance(node, list) else set()


def test_committed_document_is_up_to_date() -> None:
    assert json.loads(COMMITTED.read_text()) == document(), "run python -m app --openapi > docs/openapi.json"


def test_every_reference_has_a_schema() -> None:
    served = document()
    assert references(served) <= {f"#/components/schemas/{name}" for name in served["components"]["schemas"]}


def test_document_contains_every_route() -> None:
    monitoring = {"/health", "/livez", "/readyz", "/startupz", "/metrics"}
    paths = {*POST_PATHS, "/models", "/events/batch", *monitoring, *INFERENCE_IDS}
    assert set(document()["paths"]) == paths | OPENAI_PATHS.keys() | BATCH_IDS.keys()


def test_every_route_is_in_a_group_with_a_description_and_generate_is_first() -> None:
    served = document()
    operations = [operation for methods in served["paths"].values() for operation in methods.values()]
    assert next(iter(served["paths"].items()))[1].keys() == {"post"}
    assert next(iter(served["paths"])) == "/generate"
    assert [tag["name"] for tag in served["tags"]] == list(dict.fromkeys(tag for o in operations for tag in o["tags"]))
    assert all(tag["description"].endswith(".") for tag in served["tags"])
    assert all(len(operation["tags"]) == 1 for operation in operations)


def test_every_route_has_a_short_summary_that_its_group_has_only_once() -> None:
    operations = [operation for methods in document()["paths"].values() for operation in methods.values()]
    summaries = [(operation["tags"][0], operation["summary"]) for operation in operations]
    assert len(set(summaries)) == len(summaries)
    for _, summary in summaries:
        # FastAPI's default is the name of the function, which is one word.
        assert len(summary.split()) > 1 and len(summary) <= 50 and not summary.endswith(".")


def test_document_describes_the_body_and_responses_of_generate() -> None:
    served = document()
    generate = served["paths"]["/generate"]["post"]
    body = generate["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/GenerateRequest"}
    fields = served["components"]["schemas"]["GenerateRequest"]["properties"]
    assert set(fields) == {
        "label",
        "digit",
        "labels",
        "count",
        "seed",
        "quality",
        "num_steps",
        "sampler",
        "guidance_scale",
        "clip_guidance_scale",
        "clip_prompt",
        "noise",
        "scale",
        "model",
        "timeout_seconds",
    }
    refused = {"400", "401", "403", "406", "408", "413", "415", "422", "429", "431"}
    assert set(generate["responses"]) == refused | {"200", "500", "501", "503", "504"}
    for status in refused | {"500", "501", "503", "504"}:
        assert set(generate["responses"][status]["content"]) == {"application/problem+json"}
    # {} means that a key is optional. It is needed only with UNFOG_API_KEYS.
    assert generate["security"] == [{}, {"bearer": []}, {"header": []}]
    assert set(generate["responses"]["200"]["content"]) == {
        "application/json",
        "image/png",
        "application/zip",
        "text/event-stream",
        "image/webp",
        "image/gif",
    }


def test_document_guarantees_the_same_bytes_only_on_a_cpu() -> None:
    served = document()
    texts = [
        served["paths"]["/generate"]["post"]["description"],
        served["components"]["schemas"]["GenerateRequest"]["description"],
    ]
    for text in (served["info"]["summary"], *texts):
        assert re.search(r"On a CPU [^.]* the same bytes under any load\.", text)
    for text in texts:
        assert "On a GPU such images may differ, depending on the load" in text
    assert len(re.findall("same bytes", json.dumps(served))) == 3


def is_valid(document: dict[str, Any], schema: dict[str, Any], instance: Any) -> bool:
    """True if the instance is valid against a schema of the document."""
    whole = {**schema, "components": document["components"]}
    return bool(Draft202012Validator(whole).is_valid(instance))


def is_valid_request(document: dict[str, Any], body: dict[str, Any]) -> bool:
    return is_valid(document, {"$ref": "#/components/schemas/GenerateRequest"}, body)


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for operation in methods.values():
            yield path, operation


def described(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields (place, media type, media type object) of each request and response body."""
    for path, operation in operations(document):
        bodies = {"request": operation.get("requestBody", {}), **operation["responses"]}
        for place, body in bodies.items():
            for media_type, content in body.get("content", {}).items():
                yield f"{path} {place}", media_type, content


def examples_of(content: dict[str, Any]) -> list[Any]:
    several = [example["value"] for example in content.get("examples", {}).values()]
    return several + ([content["example"]] if "example" in content else [])


def test_each_route_has_its_operation_id() -> None:
    ids = {
        path: {method: operation["operationId"] for method, operation in methods.items()}
        for path, methods in document()["paths"].items()
    }
    assert {path: ids.pop(path) for path in BATCH_IDS} == BATCH_IDS
    assert {path: operation_id for path, of_path in ids.items() for operation_id in of_path.values()} == {
        **{path: path[1:] for path in POST_PATHS},
        "/events/batch": "watch_batch",
        **INFERENCE_IDS,
        **OPENAI_PATHS,
        **{f"/{name}": f"get_{name}" for name in ("models", "health", "livez", "readyz", "startupz", "metrics")},
    }


def test_every_text_body_has_valid_examples() -> None:
    served = document()
    num_examples = 0
    for place, media_type, content in described(served):
        found = examples_of(content)
        binary = ("image/png", "image/webp", "image/gif", "application/zip", "application/octet-stream")
        assert found or media_type in (*binary, "application/vnd.apache.parquet"), (place, media_type)
        for example in found:
            assert is_valid(served, content["schema"], example), (place, example)
        num_examples += len(found)
    assert num_examples > 25


@pytest.mark.parametrize("path", POST_PATHS)
def test_every_error_of_a_post_route_has_an_example(path: str) -> None:
    known = {(error.status, error.code): error.problem("an-id") for error, _, _ in EVERY_ERROR}
    responses = document()["paths"][path]["post"]["responses"]
    for status in set(responses) - {"200"}:
        (content,) = responses[status]["content"].values()
        for code, example in content["examples"].items():
            problem = example["value"]
            assert (problem["status"], problem["code"]) == (int(status), code)
            assert (problem["type"], problem["title"]) == ("about:blank", known[int(status), code]["title"])
    assert {*responses["503"]["content"]["application/problem+json"]["examples"]} == {
        "starting",
        "draining",
        "engine_failed",
    }
    invalid = {"invalid_request"} if path == "/generate" else {"invalid_request", "invalid_image"}
    assert {*responses["422"]["content"]["application/problem+json"]["examples"]} == invalid


@pytest.mark.parametrize("path", [*PICTURE_TASKS, "/reproduce", "/score"])
def test_route_with_pictures_has_both_content_types_and_files_in_multipart(path: str) -> None:
    served, num_formats = document(), {"/recognize": 2, "/reproduce": 2, "/score": 1}.get(path, 6)
    operation = served["paths"][path]["post"]
    content = operation["requestBody"]["content"]
    assert list(content) == ["application/json", "multipart/form-data"]
    body, form = (served["components"]["schemas"][each["schema"]["$ref"].split("/")[-1]] for each in content.values())
    assert set(body["properties"]) == set(form["properties"])
    fields = {name: field.get("items", field) for name, field in body["properties"].items()}
    pictures = {name for name, field in fields.items() if field.get("contentEncoding") == "base64"}
    assert pictures == {"/inpaint": {"image", "mask"}, "/score": {"images"}}.get(path, {"image"})
    for name, field in form["properties"].items():
        # FastAPI describes a file in this way too, and Swagger UI then shows a field for a file.
        media_type = field.get("items", field).get("contentMediaType")
        assert (media_type == "application/octet-stream") == (name in pictures)
    generate = served["paths"]["/generate"]["post"]
    assert operation["security"] == generate["security"]
    assert set(operation["responses"]) == set(generate["responses"]) - ({"501"} if path != "/score" else set())
    formats = list(generate["responses"]["200"]["content"])
    assert list(operation["responses"]["200"]["content"]) == formats[:num_formats]
    limits = {"count": 64, "timeout_seconds": 600} if num_formats == 6 else {"timeout_seconds": 600}
    for schema in (body, form):
        assert {name: schema["properties"][name]["maximum"] for name in limits} == limits


@pytest.mark.parametrize("path", [*PICTURE_TASKS, "/reproduce", "/score"])
def test_optional_fields_of_multipart_are_empty_in_swagger_ui(path: str) -> None:
    """Swagger UI fills other fields with a made-up value, such as the digit 9, and sends it."""
    form = document()["components"]["schemas"][f"{path[1:].title()}RequestForm"]
    for name, field in form["properties"].items():
        has_value = "default" in field or name in form["required"]
        assert (field.get("examples") == [""]) == (not has_value), name


@pytest.mark.parametrize("path", PICTURE_TASKS)
def test_service_accepts_the_request_examples_and_refuses_the_models_that_the_document_excludes(path: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        served = (await client.get("/openapi.json")).json()
        content = served["paths"][path]["post"]["requestBody"]["content"]
        schema = content["application/json"]["schema"]
        for body in examples_of(content["application/json"]):
            seeded = body if path == "/recognize" else {**body, "seed": 1}
            response = await client.post(path, json=seeded)
            assert response.status_code == 200, response.text
            answer = served["paths"][path]["post"]["responses"]["200"]["content"]["application/json"]
            assert is_valid(served, answer["schema"], response.json())
            changes: list[dict[str, Any]] = [{"model": "fast"}, {"timeout_seconds": 601}, {"image": 1}]
            if path == "/denoise":
                changes += [{"mode": "mean", "num_steps": 2}, {"noise_std": 1001}, {"digit": 10}]
            if path == "/inpaint":
                changes += [{"fit": "digit"}, {"count": 65}]
            for change in changes:
                assert not is_valid(served, schema, seeded | change)
                assert (await client.post(path, json=seeded | change)).status_code == 422, change

    run(check, FakeRunner(models={"default": INFO, "fast": FAST}))


@pytest.mark.parametrize("path", [*PICTURE_TASKS, "/reproduce", "/score"])
def test_examples_of_both_content_types_have_the_same_fields(path: str) -> None:
    content = document()["paths"][path]["post"]["requestBody"]["content"]
    bodies, forms = (examples_of(each) for each in content.values())
    assert [list(body) for body in bodies] == [list(form) for form in forms]
    for form in forms:
        assert {form[name] for name in ("image", "mask") if name in form} | set(form.get("images", ())) == {FILE}


def test_request_examples_use_the_recommended_steps_and_sampler() -> None:
    content = document()["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]
    assert examples_of(content)[0] == {"digit": 7}
    assert {"digit": 7, "model": "fast"} in examples_of(content)
    for body in examples_of(content):
        assert not {"num_steps", "sampler", "guidance_scale", "timeout_seconds"} & set(body)


@pytest.mark.parametrize("path", ["/generate", *GENERATING, "/reproduce"])
def test_image_in_the_example_has_the_provenance_of_the_example(path: str) -> None:
    (answer,) = examples_of(document()["paths"][path]["post"]["responses"]["200"]["content"]["application/json"])
    with Image.open(io.BytesIO(base64.b64decode(answer["images"][0]["png"], validate=True))) as image:
        assert image.size == (28, 28)
        chunks: dict[str, str] = image.text  # type: ignore[attr-defined]
    assert chunks["Model-SHA256"] == answer["model"]["sha256"]
    for chunk, field in (("Seed", "seed"), ("Steps", "num_steps"), ("Sampler", "sampler")):
        assert chunks[chunk] == str(answer[field])
    assert chunks["Digit"] == ("none" if answer["digit"] is None else str(answer["digit"]))
    assert chunks.get("Task") == (None if path in ("/generate", "/reproduce") else path[1:])


@pytest.mark.parametrize("path", ["/generate", *GENERATING])
def test_document_describes_the_events_of_a_stream(path: str) -> None:
    served = document()
    schemas = served["components"]["schemas"]
    stream = served["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]
    assert stream["x-itemSchema"] == {"$ref": "#/components/schemas/StreamEvent"}
    data = {
        event["properties"]["event"]["const"]: event["properties"]["data"]["contentSchema"]
        for event in schemas["StreamEvent"]["oneOf"]
    }
    assert list(data) == ["accepted", "progress", "image", "done", "error"]
    assert data["error"] == {"$ref": "#/components/schemas/Problem"}
    events = [event.split("\n") for event in stream["example"].strip().split("\n\n")]
    names = [name.removeprefix("event: ") for name, _ in events]
    assert names == ["accepted", "progress", "image", "done"]
    for name, (_, line) in zip(names, events, strict=True):
        content = line.removeprefix("data: ")
        assert is_valid(served, data[name], json.loads(content))
        assert is_valid(served, stream["x-itemSchema"], {"event": name, "data": content})
        assert not is_valid(served, data[name], {})
    assert not is_valid(served, stream["x-itemSchema"], {"event": "unknown", "data": "{}"})


def test_document_describes_the_stream_of_batches() -> None:
    served = document()
    stream = served["paths"]["/events/batch"]["get"]["responses"]["200"]["content"]["text/event-stream"]
    assert stream["x-itemSchema"] == {"$ref": "#/components/schemas/BatchStreamEvent"}
    kinds = served["components"]["schemas"]["BatchStreamEvent"]["oneOf"]
    assert [kind["properties"]["event"]["const"] for kind in kinds] == ["batch", "error"]
    name, data = stream["example"].strip().split("\ndata: ")
    assert name == "event: batch"
    schema = kinds[0]["properties"]["data"]["contentSchema"]
    assert is_valid(served, schema, json.loads(data))
    assert not is_valid(served, schema, {**json.loads(data), "rows": [{}]})


@pytest.mark.parametrize("path", ["/models", "/events/batch"])
def test_document_describes_the_errors_of_a_get_route_with_a_key(path: str) -> None:
    served = document()
    operation = served["paths"][path]["get"]
    assert operation["security"] == served["paths"]["/generate"]["post"]["security"]
    codes = {
        code
        for status, response in operation["responses"].items()
        if status != "200"
        for code in response["content"]["application/problem+json"]["examples"]
    }
    of_both = {"unauthorized", "forbidden", "rate_limited", "internal_error", "starting", "draining", "engine_failed"}
    assert codes == of_both | ({"not_acceptable", "overloaded"} if path == "/events/batch" else set())


SHIPPED_BODIES = [
    ({"digit": 7}, True),
    ({"digit": 7, "num_steps": 1}, True),
    ({"digit": 7, "model": "default", "num_steps": 1, "sampler": "dpmpp", "guidance_scale": 2}, True),
    ({"digit": 7, "model": "fast"}, True),
    ({"digit": 7, "model": "fast", "num_steps": 4, "sampler": "ddim", "guidance_scale": 1.0}, True),
    ({"digit": 7, "model": "fast", "num_steps": 4.0}, True),
    ({"digit": 7, "model": "fast", "num_steps": 1}, True),
    ({"digit": 7, "model": "fast", "num_steps": 3}, False),
    ({"digit": 7, "model": "fast", "num_steps": 100}, False),
    ({"digit": 7, "model": "fast", "sampler": "ddpm"}, False),
    ({"digit": 7, "model": "fast", "guidance_scale": 2}, False),
    ({"digit": 7, "model": "slow"}, False),
    ({"digit": 7, "clip_prompt": "a thick seven"}, False),
    ({"digit": 7, "clip_prompt": "a thick seven", "clip_guidance_scale": 0}, False),
    ({"digit": 7, "clip_prompt": "a thick seven", "clip_guidance_scale": 0.1}, True),
    ({"digit": 7, "clip_guidance_scale": 0.1}, True),
    ({"labels": ["7", 1]}, True),
    ({"labels": ["7", "eleven"]}, False),
    ({"labels": []}, False),
    ({"labels": [1] * 65}, False),
    ({"labels": [7], "digit": 7}, False),
    ({"labels": [7], "count": 1}, False),
    ({"labels": [7], "clip_guidance_scale": 2}, False),
    ({"labels": [7], "clip_guidance_scale": 0}, True),
]


@pytest.mark.parametrize(("body", "valid"), SHIPPED_BODIES)
def test_document_contains_the_limits_of_the_shipped_models(body: dict[str, Any], valid: bool) -> None:
    assert is_valid_request(document(), body) is valid


def test_document_has_no_limits_of_a_model_without_a_readable_checkpoint(tmp_path: Path) -> None:
    served = create_app(Settings(checkpoint=tmp_path / "missing.safetensors")).openapi()
    assert served["components"]["schemas"]["GenerateRequest"]["allOf"] == [
        PROMPT_NEEDS_A_SCALE,
        NEEDS_A_CLASS,
        LABELS_ALONE,
        QUALITY_ALONE,
        ONE_CLASS,
    ]


FAST = replace(INFO, name="fast", steps=(4, 2), samplers=("ddim",), guidable=False)
MODELS: list[dict[str, ModelInfo]] = [
    {"default": INFO},
    {"default": INFO, "fast": FAST},
    {"default": replace(INFO, class_names=tuple("01234"))},
    {"default": replace(INFO, schedule=Schedule(ScheduleConfig(num_steps=50)))},
    {
        "default": replace(INFO, guidable=False, samplers=("dpmpp", "ddim")),
        "fast": replace(FAST, class_names=tuple("012")),
    },
    {"default": replace(INFO, steps=(10, 20))},
]
FIELDS: list[dict[str, Any]] = [
    {},
    *({"digit": digit} for digit in (0, 2, 3, 5, 9, 10)),
    *({"num_steps": number} for number in (1, 2, 3, 4, 10, 20, 50, 51, 100, 101)),
    *({"sampler": sampler} for sampler in ("ddpm", "ddim", "dpmpp", "euler")),
    *({"guidance_scale": scale} for scale in (1, 1.0, 1.5, 10, 11)),
    *({"quality": quality} for quality in ("draft", "balanced", "best", "high", None)),
    {"quality": "draft", "num_steps": 10},
    {"quality": "draft", "sampler": "ddim"},
]


@pytest.mark.parametrize("models", MODELS)
def test_service_accepts_exactly_the_requests_that_its_document_permits(models: dict[str, ModelInfo]) -> None:
    accepted, refused = 0, 0

    async def check(client: httpx.AsyncClient) -> None:
        nonlocal accepted, refused
        served = (await client.get("/openapi.json")).json()
        for fields in FIELDS:
            for named in ({}, {"model": "default"}, {"model": "fast"}):
                body = {"digit": 0, "seed": 1, **fields, **named}
                status = (await client.post("/generate", json=body)).status_code
                assert status == (200 if is_valid_request(served, body) else 422), body
                accepted, refused = accepted + (status == 200), refused + (status == 422)
        content = served["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]
        for body in examples_of(content):
            drawn = await client.post("/generate", json={"seed": 1, **body})  # FakeRunner supports only small seeds
            assert drawn.status_code == 200, body

    run(check, FakeRunner(models=models))
    assert accepted
    assert refused


def test_document_is_built_again_after_the_checkpoints_are_loaded() -> None:
    app = create_app(Settings(), lambda: FakeRunner(models={"default": replace(INFO, steps=(10,))}))
    body = {"digit": 7, "num_steps": 11}
    assert is_valid_request(app.openapi(), body)
    app.state.service.engine.models = {"default": replace(INFO, steps=(10,))}
    assert not is_valid_request(app.openapi(), body)
    assert app.openapi() is app.openapi()
