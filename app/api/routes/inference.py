"""The routes of the Open Inference Protocol, version 2, with the extension for binary tensors.

https://github.com/kserve/open-inference-protocol
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Header, Request
from starlette.responses import JSONResponse, Response

from app import VERSION, errors
from app.api.generation import Service, ServiceDependency, encoded
from app.api.idempotency import IdempotencyKey, seed_of
from app.api.inference.schemas import (
    EXTENSIONS,
    NAME,
    PLATFORM,
    InferenceError,
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
from app.api.options import options_of
from app.api.probes import probe_response
from app.api.requests import check_single, read_body
from app.api.responses import BINARY, ERRORS, JSON, OCTETS
from app.api.schemas import SamplingRequest, new_seed
from app.api.task import Task
from app.engine.engine import EngineState
from app.engine.interface import ModelInfo
from app.engine.job import ImageKey, Job, Pixels
from model.png import MAX_SEED

open_router, router = APIRouter(), APIRouter()  # open_router: the routes that need no API key

_ERRORS: dict[int | str, dict[str, Any]] = {
    **{
        status: {"model": InferenceError, "description": ERRORS[status]["description"]}
        for status in (401, 403, 408, 413, 429, 500, 503, 504)
    },
    431: ERRORS[431],  # The HTTP server sends this error without the routes.
    400: {
        "model": InferenceError,
        "description": "malformed_json, malformed_request, or invalid_request: a tensor, a parameter, a field or a "
        "header is missing, unknown or invalid, or the model does not support its value",
    },
    404: {"model": InferenceError, "description": "not_found: no model has this name"},
}
_READ_ERRORS: dict[int | str, dict[str, Any]] = {status: _ERRORS[status] for status in (404, 503)}

LengthHeader = Annotated[
    str,
    Header(
        alias=LENGTH_HEADER,
        pattern=f"^{LENGTH.pattern}$",
        description="Number of bytes of the JSON object at the start of the body, if binary tensors follow it.",
    ),
]
NO_LENGTH: str = None  # type: ignore[assignment] # FastAPI does not validate the default


@open_router.get("/v2", operation_id="get_inference_server", response_model=ServerMetadata)
async def server() -> JSONResponse:
    """Returns the name and the release of the service. Needs no API key and does not count against the rate limit."""
    return JSONResponse(ServerMetadata(name=NAME, version=VERSION, extensions=EXTENSIONS).model_dump())


@open_router.get(
    "/v2/health/live",
    operation_id="get_inference_liveness",
    response_model=ServerLiveness,
    responses={503: {"model": ServerLiveness}},
)
async def live(request: Request, service: ServiceDependency) -> JSONResponse:
    """Has the same status as /livez. Needs no API key and does not count against the rate limit."""
    return probe_response(request, service.engine, {"live": service.engine.alive}, service.engine.alive)


@open_router.get(
    "/v2/health/ready",
    operation_id="get_inference_readiness",
    response_model=ServerReadiness,
    responses={503: {"model": ServerReadiness}},
)
async def ready(request: Request, service: ServiceDependency) -> JSONResponse:
    """Has the same status as /readyz. Needs no API key and does not count against the rate limit."""
    is_ready = service.engine.apparent_state is EngineState.OK
    return probe_response(request, service.engine, {"ready": is_ready}, is_ready)


@open_router.get(
    "/v2/models/{name}",
    operation_id="get_inference_model",
    response_model=ModelMetadata,
    responses=_READ_ERRORS,
)
async def model(service: ServiceDependency, name: str) -> JSONResponse:
    """Returns the tensors of a model. Needs no API key and does not count against the rate limit."""
    channels, height, width = _info(service, name).image_shape
    seed = TensorMetadata(name="seed", datatype="INT64", shape=[-1])
    answer = ModelMetadata(
        name=name,
        platform=PLATFORM,
        inputs=[TensorMetadata(name="digit", datatype="INT64", shape=[-1]), seed],
        outputs=[TensorMetadata(name="image", datatype="UINT8", shape=[-1, height, width, channels]), seed],
    )
    return JSONResponse(answer.model_dump())


@open_router.get(
    "/v2/models/{name}/ready",
    operation_id="get_inference_model_readiness",
    response_model=ModelReadiness,
    responses={404: _ERRORS[404], 503: {"model": ModelReadiness}},
)
async def model_ready(request: Request, service: ServiceDependency, name: str) -> JSONResponse:
    """Returns 200 if the model accepts requests, otherwise 503.

    Needs no API key and does not count against the rate limit.
    """
    _check_name(service, name)
    is_ready = service.engine.apparent_state is EngineState.OK
    return probe_response(request, service.engine, {"name": name, "ready": is_ready}, is_ready)


@router.post(
    "/v2/models/{name}/infer",
    operation_id="infer",
    response_class=JSONResponse,
    responses={
        200: {
            "model": InferenceResponse,
            "description": "the requested outputs, as application/octet-stream if at least one of them is binary",
            "content": {OCTETS: BINARY},
        },
        **_ERRORS,
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {JSON: {"schema": {"$ref": "#/components/schemas/InferenceRequest"}}, OCTETS: BINARY},
        }
    },
)
async def infer(
    request: Request,
    service: ServiceDependency,
    name: str,
    idempotency_key: IdempotencyKey,
    length: LengthHeader = NO_LENGTH,
) -> Response:
    """Generates one image for each element of the input `digit`.

    Image i equals the first image of /generate with digit i, seed i and the same options. All images of a request are
    admitted, cancelled and answered together.
    """
    _check_encoding(request)
    check_single(request, LENGTH_HEADER)
    info, settings = _info(service, name), service.settings
    body = await read_body(request, settings.max_body_bytes, settings.read_timeout)
    inputs = read_inputs(body, length, settings.largest_request)
    check_elements(inputs, "digit", info.num_classes - 1)
    check_elements(inputs, "seed", MAX_SEED)
    seeds = inputs.elements.get("seed") or _seeds(len(inputs.elements["digit"]), idempotency_key)

    def encode(job: Job, images: list[Pixels]) -> tuple[bytes, int | None]:
        pixels = np.stack(images)  # (N, H, W) or (N, H, W, 3)
        arrays: dict[str, Array] = {
            "image": pixels[..., None] if pixels.ndim == 3 else pixels,
            "seed": np.array(seeds, np.int64),
        }
        return write_outputs(info.name, inputs.request, arrays)

    with _errors_in_parameters():
        task = _task(inputs, seeds, info)
        (content, json_length), server_timing = await encoded(request, service, task, encode)
    headers = {"Server-Timing": server_timing}
    if len(set(seeds)) == 1:
        headers["X-Seed"] = str(seeds[0])
    if json_length is not None:
        headers[LENGTH_HEADER] = str(json_length)
    return Response(content, media_type=JSON if json_length is None else OCTETS, headers=headers)


@contextmanager
def _errors_in_parameters() -> Iterator[None]:
    """Corrects the location of invalid fields: in other routes, the fields of `parameters` are in the body itself."""
    try:
        yield
    except errors.InvalidRequest as error:
        found = [{**each, "loc": ["body", "parameters", *each["loc"][1:]]} for each in error.errors]
        raise errors.InvalidRequest(found) from None


def _task(inputs: Inputs, seeds: Sequence[int], info: ModelInfo) -> Task:
    """Returns the task of a request. Raises InvalidRequest if the model does not support a parameter."""
    digits, parameters = inputs.elements["digit"], inputs.request.parameters
    options = parameters.model_dump(include={"num_steps", "sampler", "guidance_scale"}, exclude_none=True)
    body = SamplingRequest(model=info.name, seed=seeds[0], **options)
    return Task(
        options_of(body, digits[0], info),
        len(digits),
        parameters.timeout_seconds,
        images=tuple(ImageKey(digit, seed, 0) for digit, seed in zip(digits, seeds, strict=True)),
    )


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
    names = list(service.engine.models) or service.settings.model_names
    if name not in names:
        raise errors.NotFound(f"No model has this name. The models are: {', '.join(names)}")


def _check_encoding(request: Request) -> None:
    """Raises InvalidRequest if the body is compressed."""
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        message = "Compressed bodies are not supported. Send the body without compression"
        raise errors.InvalidRequest([{"loc": ["header", "Content-Encoding"], "msg": message}])
