"""The routes of the Open Inference Protocol, version 2, with the extension for binary tensors.

https://github.com/kserve/open-inference-protocol
"""

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from fastapi import Header, Request
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.responses import JSONResponse, Response

from app import VERSION, errors
from app.api.http.idempotency import IdempotencyKey, seed_of
from app.api.http.media_types import JSON, OCTETS
from app.api.http.probes import probe_response
from app.api.http.requests import check_single, read_body
from app.api.inference.schemas import (
    EXTENSIONS,
    NAME,
    PLATFORM,
    InferenceError,
    InferenceRequest,
    InferenceResponse,
    ModelMetadata,
    ModelReadiness,
    ServerLiveness,
    ServerMetadata,
    ServerReadiness,
    TensorMetadata,
)
from app.api.inference.tensors import (
    LENGTH,
    LENGTH_HEADER,
    Array,
    Inputs,
    check_elements,
    read_inputs,
    write_outputs,
)
from app.api.operations import (
    BINARY,
    REF,
    STATUS,
    Offer,
    Operation,
    Router,
    Schema,
    body_of,
    change_examples,
    default_of,
    unavailable,
)
from app.api.service import Service, ServiceDependency, encoded
from app.engine.engine import EngineState
from app.engine.interface import ModelInfo
from app.engine.job import ImageKey, Job, Pixels
from app.tasks.generate import generate_each
from app.tasks.sampling import SamplingFields, new_seed
from app.tasks.task import Task
from model.png import MAX_SEED
from model.spec import MOST_STEPS, PIPELINE_SAMPLERS

open_router, router = Router(), Router()  # open_router: the operations that need no API key

GROUP = "Open Inference"
MODEL_PATH = "/v2/models/{name}"
STATUSES = {
    400: "malformed_json, malformed_request, or invalid_request: a tensor, a parameter, a field or a "
    "header is missing, unknown or invalid, or the model does not support its value",
    404: "not_found: no model has this name",
    **{status: STATUS[status] for status in (401, 403, 408, 413, 429, 431, 500, 503, 504)},
}
ERRORS = (
    errors.BodyTooLarge(default_of("max_body_bytes")),
    errors.NotFound("No model has this name. The models are: default, fast"),
    errors.InvalidRequest([{"loc": ["body", "inputs"], "msg": "The input 'digit' is required"}]),
)
DIGITS = {"name": "digit", "datatype": "INT64", "shape": [3], "data": [7, 7, 0]}
SEEDS = {"name": "seed", "datatype": "INT64", "shape": [3], "data": [1, 2, 3]}

SEED_METADATA: dict[str, Any] = {"name": "seed", "datatype": "INT64", "shape": [-1]}

LengthHeader = Annotated[
    str,
    Header(
        alias=LENGTH_HEADER,
        pattern=f"^{LENGTH.pattern}$",
        description="Number of bytes of the JSON object at the start of the body, if binary tensors follow it.",
    ),
]
NO_LENGTH: str = None  # type: ignore[assignment] # FastAPI does not validate the default


def _operation(
    path: str, name: str, summary: str, answer: type[BaseModel], example: Schema, **further: Any
) -> Operation:
    return Operation(
        path=path,
        name=name,
        group=GROUP,
        summary=summary,
        answer=answer,
        example=example,
        error=InferenceError,
        errors=ERRORS,
        **further,
    )


def _naming_models(operation: Schema, offer: Offer) -> dict[str, Schema]:
    """Adds the names of the models to the path."""
    operation["parameters"][0]["schema"]["enum"] = offer.names
    return {}


@open_router.operation(
    _operation(
        "/v2",
        "get_inference_server",
        "Get the name and the release of the service",
        ServerMetadata,
        {"name": NAME, "version": VERSION, "extensions": EXTENSIONS},
    )
)
async def server() -> JSONResponse:
    """Returns the name and the release of the service. Needs no API key and does not count against the rate limit."""
    return JSONResponse(ServerMetadata(name=NAME, version=VERSION, extensions=EXTENSIONS).model_dump())


@open_router.operation(
    _operation(
        "/v2/health/live",
        "get_inference_liveness",
        "Check whether the process must be restarted",
        ServerLiveness,
        {"live": True},
        others=unavailable(ServerLiveness, {"live": False}),
    )
)
async def live(request: Request, service: ServiceDependency) -> JSONResponse:
    """Has the same status as /livez. Needs no API key and does not count against the rate limit."""
    return probe_response(request, service.engine, {"live": service.engine.alive}, service.engine.alive)


@open_router.operation(
    _operation(
        "/v2/health/ready",
        "get_inference_readiness",
        "Check whether requests are accepted",
        ServerReadiness,
        {"ready": True},
        others=unavailable(ServerReadiness, {"ready": False}),
    )
)
async def ready(request: Request, service: ServiceDependency) -> JSONResponse:
    """Has the same status as /readyz. Needs no API key and does not count against the rate limit."""
    is_ready = service.engine.apparent_state is EngineState.OK
    return probe_response(request, service.engine, {"ready": is_ready}, is_ready)


@open_router.operation(
    _operation(
        MODEL_PATH,
        "get_inference_model",
        "Get the tensors of a model",
        ModelMetadata,
        {
            "name": "default",
            "platform": PLATFORM,
            "inputs": [{"name": "digit", "datatype": "INT64", "shape": [-1]}, SEED_METADATA],
            "outputs": [{"name": "image", "datatype": "UINT8", "shape": [-1, 28, 28, 1]}, SEED_METADATA],
        },
        statuses={status: STATUSES[status] for status in (404, 503)},
        complete=_naming_models,
    )
)
async def model(service: ServiceDependency, name: str) -> JSONResponse:
    """Returns the tensors of a model. Needs no API key and does not count against the rate limit."""
    info = _info(service, name)
    channels, height, width = info.image_shape
    seed = TensorMetadata(**SEED_METADATA)
    answer = ModelMetadata(
        name=name,
        platform=PLATFORM,
        inputs=[TensorMetadata(name=_input_of(info), datatype="INT64", shape=[-1]), seed],
        outputs=[TensorMetadata(name="image", datatype="UINT8", shape=[-1, height, width, channels]), seed],
    )
    return JSONResponse(answer.model_dump())


@open_router.operation(
    _operation(
        f"{MODEL_PATH}/ready",
        "get_inference_model_readiness",
        "Check whether a model accepts requests",
        ModelReadiness,
        {"name": "default", "ready": True},
        statuses={404: STATUSES[404]},
        others=unavailable(ModelReadiness, {"name": "default", "ready": False}),
        complete=_naming_models,
    )
)
async def model_ready(request: Request, service: ServiceDependency, name: str) -> JSONResponse:
    """Returns 200 if the model accepts requests, otherwise 503.

    Needs no API key and does not count against the rate limit.
    """
    _check_name(service, name)
    is_ready = service.engine.apparent_state is EngineState.OK
    return probe_response(request, service.engine, {"name": name, "ready": is_ready}, is_ready)


def _complete(operation: Schema, offer: Offer) -> dict[str, Schema]:
    """Returns the schema of a request and of its parts, with the limits of the settings."""
    _, definitions = models_json_schema([(InferenceRequest, "validation")], ref_template=REF)
    schemas: dict[str, Schema] = definitions["$defs"]
    tensor, parameters = schemas["InputTensor"]["properties"], schemas["InferenceParameters"]["properties"]
    tensor["shape"]["items"]["maximum"] = tensor["data"]["maxItems"] = offer.settings.largest_request
    parameters["timeout_seconds"]["maximum"] = offer.settings.longest_timeout
    if offer.models:  # The model is in the path, so there is one schema for all models.
        samplers = {sampler for spec in offer.models.values() for sampler in spec.samplers}
        parameters["sampler"]["enum"] = [each for each in PIPELINE_SAMPLERS if each in samplers]
        parameters["num_steps"]["maximum"] = min(max(spec.max_steps for spec in offer.models.values()), MOST_STEPS)
    default = next(iter(offer.models.values()), None)
    if default and not default.has_digits:
        change_examples(operation, _with_labels)
    return schemas | _naming_models(operation, offer)


def _with_labels(body: Schema) -> Schema:
    """Returns the body of an example for a model whose classes are not digits."""
    inputs = [
        {**each, "name": "label", "data": [0] * len(each["data"])} if each["name"] == "digit" else each
        for each in body["inputs"]
    ]
    return {**body, "inputs": inputs}


REQUESTS: dict[str, tuple[str, Schema]] = {
    "seeds": (
        "Three digits with fixed seeds. The response has only the images",
        {
            "id": "42",
            "parameters": {"num_steps": 4, "sampler": "ddim", "guidance_scale": 1},
            "inputs": [DIGITS, SEEDS],
            "outputs": [{"name": "image"}],
        },
    ),
    "one": ("One digit", {"inputs": [{**DIGITS, "shape": [1], "data": [7]}]}),
    "binary": (
        "Three digits. The outputs are binary",
        {"parameters": {"binary_data_output": True}, "inputs": [DIGITS]},
    ),
}


@router.operation(
    _operation(
        f"{MODEL_PATH}/infer",
        "infer",
        "Generate images from tensors of classes and seeds",
        InferenceResponse,
        {
            "model_name": "default",
            "id": "42",
            "outputs": [{"name": "seed", "datatype": "INT64", "shape": [3], "data": [1, 2, 3]}],
        },
        method="POST",
        description="the requested outputs, as application/octet-stream if at least one of them is binary",
        formats={OCTETS: BINARY},
        body={**body_of(InferenceRequest, REQUESTS), OCTETS: BINARY},
        statuses=STATUSES,
        complete=_complete,
    )
)
async def infer(
    request: Request,
    service: ServiceDependency,
    name: str,
    idempotency_key: IdempotencyKey,
    length: LengthHeader = NO_LENGTH,
) -> Response:
    """Generates one image for each element of the input `label`, or `digit` for a model of digits.

    Image i equals the first image of /generate with label i, seed i and the same options. All images of a request are
    admitted, cancelled and answered together.
    """
    _check_encoding(request)
    check_single(request, LENGTH_HEADER)
    info, settings = _info(service, name), service.settings
    body = await read_body(request, settings.max_body_bytes, settings.read_timeout)
    inputs = read_inputs(body, length, settings.largest_request, _input_of(info))
    check_elements(inputs, inputs.label, info.num_classes - 1)
    check_elements(inputs, "seed", MAX_SEED)
    seeds = inputs.elements.get("seed") or _seeds(len(inputs.elements[inputs.label]), idempotency_key)

    def encode(job: Job, images: list[Pixels]) -> tuple[bytes, int | None]:
        pixels = np.stack(images)  # (N, H, W) or (N, H, W, 3)
        arrays: dict[str, Array] = {
            "image": pixels[..., None] if pixels.ndim == 3 else pixels,
            "seed": np.array(seeds, np.int64),
        }
        return write_outputs(info.name, inputs.request, arrays)

    (content, json_length), server_timing = await encoded(request, service, _task(inputs, seeds, info), encode)
    headers = {"Server-Timing": server_timing}
    if len(set(seeds)) == 1:
        headers["X-Seed"] = str(seeds[0])
    if json_length is not None:
        headers[LENGTH_HEADER] = str(json_length)
    return Response(content, media_type=JSON if json_length is None else OCTETS, headers=headers)


def _task(inputs: Inputs, seeds: Sequence[int], info: ModelInfo) -> Task:
    """Returns the task of a request. Raises FieldError if the model does not support a parameter."""
    labels, parameters = inputs.elements[inputs.label], inputs.request.parameters
    options = parameters.model_dump(
        include={"num_steps", "sampler", "guidance_scale", "timeout_seconds"}, exclude_none=True
    )
    fields = SamplingFields(count=len(labels), seed=seeds[0], **options)
    return generate_each(info, fields, [ImageKey(label, seed, 0) for label, seed in zip(labels, seeds, strict=True)])


def _input_of(info: ModelInfo) -> str:
    """Returns the name of the input with the classes in the metadata of the model."""
    return "digit" if info.has_digits else "label"


def _seeds(number: int, idempotency_key: str | None) -> list[int]:
    """Returns successive seeds. The first one follows from the key, or is random without a key."""
    first = seed_of(idempotency_key) if idempotency_key else new_seed()
    return [(first + i) % (MAX_SEED + 1) for i in range(number)]


def _info(service: Service, name: str) -> ModelInfo:
    """Returns a model. Raises NotFound if the name is unknown, Starting or EngineFailed if no model is loaded."""
    _check_name(service, name)
    return service.info(name)


def _check_name(service: Service, name: str) -> None:
    """Raises NotFound if no model has this name."""
    names = list(service.engine.models) or list(service.settings.model_paths)
    if name not in names:
        raise errors.NotFound(f"No model has this name. The models are: {', '.join(names)}")


def _check_encoding(request: Request) -> None:
    """Raises InvalidRequest if the body is compressed."""
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        message = "Compressed bodies are not supported. Send the body without compression"
        raise errors.InvalidRequest([{"loc": ["header", "Content-Encoding"], "msg": message}])
