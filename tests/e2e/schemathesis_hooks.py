"""Adapts the requests that schemathesis generates for routes with pictures or prompts, and for /v2/models/{name}/infer.

A JSON schema cannot describe a picture, or a prompt that names one digit: every string is valid for the schema. The
hooks replace the strings by pictures and prompts. They leave out multipart bodies, in which a wrong type can be valid,
because the number 7 and the text 7 are the same bytes. They also leave out streams, because schemathesis compares each
event with the schema of the whole text. Other tests of this folder test both.

A JSON schema cannot describe that the shape of a tensor fits its elements, that names are unique, that binary tensors
follow the JSON object, or what the model in the path permits. The hooks repair valid requests in these respects.
tests/app/api/inference/test_tensors.py tests binary bodies and requests that break these rules.
"""

import base64
from functools import cache
from typing import Any, get_args

import httpx
import schemathesis

from app.api.openai.schemas import AUTO, MAX_PROMPT, Quality
from tests.e2e.process import TIMEOUT

INFER_PATH = "/v2/models/{name}/infer"
PICTURES = ("image", "mask")
OPENAI, GENERATE, REPRODUCE = "/v1/images/", "/generate", "/reproduce"
FILES_PATH, BATCHES_PATH = "/v1/files", "/v1/batches"


@schemathesis.hook
def before_load_schema(context: Any, raw_schema: dict[str, Any]) -> None:
    for operations in raw_schema["paths"].values():
        for operation in operations.values():
            for media_type in ("multipart/form-data", "application/octet-stream"):
                operation.get("requestBody", {"content": {}})["content"].pop(media_type, None)
    for schema in raw_schema["components"]["schemas"].values():
        # Schemathesis takes long to generate any value. Other tests send every kind of value in ignored fields.
        fields = schema.get("properties", {})
        for name in [name for name, field in fields.items() if "whatever its value" in field.get("description", "")]:
            if not {"type", "anyOf", "$ref"} & set(fields[name]):
                del fields[name]


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    if case.meta.generation.mode.is_positive:
        repair(case)
    if not isinstance(case.body, dict):
        return
    if case.path.startswith(OPENAI):
        simplify_openai(case.body)
    elif case.path == GENERATE:
        case.body.setdefault("num_steps", 2)  # both models permit it, and the default takes much longer
    elif case.path == "/recognize":
        case.body.setdefault("num_pairs", 1)  # The defaults of all these fields take much longer.
    elif "image" in case.body and case.path != REPRODUCE:
        case.body.setdefault("num_steps", 1)
        case.body.setdefault("digit", 7)  # without a search for it
    if isinstance(case.body.get("images"), list):
        (picture, *_) = example_of(case, "images")
        case.body["images"] = [picture if isinstance(each, str) else each for each in case.body["images"]]
    for name in PICTURES:
        if isinstance(case.body.get(name), str):
            case.body[name] = own_picture(case.operation.base_url) if case.path == REPRODUCE else example_of(case, name)


def repair(case: Any) -> None:
    """Makes a request valid whose schema permits more. Random ids of files and batches, for example, never exist."""
    if case.path == INFER_PATH:
        repair_inference(case)
    url = case.operation.base_url.rstrip("/")
    if "file" in case.path_parameters:
        case.path_parameters["file"] = upload(url)
    if "batch" in case.path_parameters:
        case.path_parameters["batch"] = new_batch(url)
    if case.path == BATCHES_PATH and case.method.upper() == "POST":
        case.body = {**case.body, "input_file_id": upload(url), "endpoint": "/generate"}
        case.body.pop("webhook_url", None)  # No host is permitted.
    if case.path in (FILES_PATH, BATCHES_PATH) and case.query:
        case.query.pop("after", None)


def upload(url: str) -> str:
    """Uploads a file with one line, and returns its id."""
    line = b'{"custom_id": "a", "method": "POST", "url": "/generate", "body": {"digit": 7, "num_steps": 4}}'
    answer = httpx.post(f"{url}{FILES_PATH}", data={"purpose": "batch"}, files={"file": line}, timeout=TIMEOUT)
    return str(answer.raise_for_status().json()["id"])


def new_batch(url: str) -> str:
    """Creates a batch of one line, and returns its id."""
    body = {"input_file_id": upload(url), "endpoint": "/generate", "completion_window": "24h"}
    return str(httpx.post(f"{url}{BATCHES_PATH}", json=body, timeout=TIMEOUT).raise_for_status().json()["id"])


def simplify_openai(body: dict[str, Any]) -> None:
    """Replaces a valid prompt by one that names a digit, and makes the request short and without a stream."""
    prompt = body.get("prompt")
    if isinstance(prompt, str) and 1 <= len(prompt) <= MAX_PROMPT:
        body["prompt"] = "a handwritten seven, please"
    # The defaults take much longer.
    if body.get("quality") in (None, *get_args(Quality)):
        body["quality"] = "low"
    if body.get("size") in (None, AUTO):
        body["size"] = "28x28"
    if "n" in body and isinstance(body.get("mask"), str):
        del body["mask"]  # An image takes 73 steps with a mask, and 10 without. Bodies without n keep theirs.
    if body.get("stream") is True:
        body["stream"] = False


def example_of(case: Any, field: str) -> Any:
    """Returns the value of the field in the first example that has it."""
    examples = case.operation.definition.raw["requestBody"]["content"]["application/json"]["examples"].values()
    return next(example["value"][field] for example in examples if field in example["value"])


@cache
def own_picture(base_url: str) -> str:
    """Returns a picture that the service has generated, in base64. /reproduce accepts no other pictures."""
    url = f"{base_url.rstrip('/')}/generate"
    body, headers = {"digit": 7, "num_steps": 1}, {"accept": "image/png"}
    answer = httpx.post(url, json=body, headers=headers, timeout=TIMEOUT).raise_for_status()
    return base64.b64encode(answer.content).decode()


def repair_inference(case: Any) -> None:
    """Makes a request valid that has the types and the fields of the schema."""
    case.headers.pop("Inference-Header-Content-Length", None)
    body = case.body
    digits = [digit % 10 for digit in body["inputs"][0].get("data", [])] or [7]
    seeds = [seed % 2**53 for seed in body["inputs"][-1].get("data", [])]
    body["inputs"] = [_tensor("digit", digits)]
    if len(seeds) == len(digits):
        body["inputs"].append(_tensor("seed", seeds))
    if "outputs" in body:
        body["outputs"] = list({output["name"]: output for output in body["outputs"]}.values())
    if case.path_parameters["name"] == "fast":
        for name in ("num_steps", "sampler", "guidance_scale"):
            body.get("parameters", {}).pop(name, None)
    else:
        body.setdefault("parameters", {}).setdefault("num_steps", 1)  # the default number takes much longer


def _tensor(name: str, elements: list[int]) -> dict[str, Any]:
    return {"name": name, "datatype": "INT64", "shape": [len(elements)], "data": elements}
