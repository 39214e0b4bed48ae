"""POST /generate: generates digits and answers with JSON, PNG, ZIP or a stream of events."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import JSONResponse, Response

from app.api.context import RequestContext, context_of
from app.api.events import EventStream, JobEvents
from app.api.generation import Service, ServiceDependency, finish
from app.api.images import encode_base64, encode_images, encode_sheet, encode_zip
from app.api.problems import client_gone
from app.api.requests import ClientGoneError, negotiate, read_json
from app.api.schemas import GeneratedImage, GenerateRequest, GenerateResponse, ModelName, Problem, Timing
from app.engine.job import Job, Pixels
from model.png import Provenance

router = APIRouter()

JSON, PNG, ZIP, EVENTS = "application/json", "image/png", "application/zip", "text/event-stream"
FORMATS = (JSON, PNG, ZIP, EVENTS)  # If q values in Accept are equal, the first of these types is chosen.
Encoder = Callable[[list[Pixels], Provenance, int], bytes]

PREVIEWS = "Approximate number of progress events in a stream. Other formats ignore it."
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_PROBLEM = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": text, "content": _PROBLEM}
    for status, text in {
        400: "malformed_json or malformed_request",
        401: "unauthorized: UNFOG_API_KEYS is set and the request has no API key",
        403: "forbidden: the API key is invalid",
        406: "not_acceptable: the Accept header allows none of the formats",
        408: "request_timeout: the body did not arrive within UNFOG_READ_TIMEOUT seconds",
        413: "body_too_large: the body exceeds UNFOG_MAX_BODY_BYTES",
        415: "unsupported_media_type: Content-Type is not application/json",
        422: "invalid_request: a field is missing, unknown or invalid, or the model does not support its value",
        429: "overloaded (the queue is full or a deadline could not be met) or rate_limited, with Retry-After",
        431: "headers_too_large: a header exceeds 8 KiB, all headers exceed 32 KiB, or there are 1,000 or more",
        500: "internal_error: a bug in the service",
        503: "starting, draining or engine_failed, with Retry-After",
        504: "deadline_exceeded: the images were not finished before the deadline",
    }.items()
}


@router.post(
    "/generate",
    operation_id="generate",
    response_class=JSONResponse,
    responses={
        200: {
            "model": GenerateResponse,
            "description": "the images, in the format that Accept selects",
            "content": {PNG: _BINARY, ZIP: _BINARY, EVENTS: {"schema": {"type": "string"}}},
        },
        **_ERRORS,
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {JSON: {"schema": {"$ref": "#/components/schemas/GenerateRequest"}}},
        }
    },
)
async def generate(
    request: Request,
    service: ServiceDependency,
    previews: Annotated[int, Query(ge=0, le=100, description=PREVIEWS, examples=[10])] = 10,
) -> Response:
    """Generates images of a digit. On a CPU the same request with the same seed gives the same bytes under any load.

    On a GPU such images may differ in the last bits of the network's precision, depending on the load.
    """
    media_type = negotiate(request, FORMATS)
    settings = service.settings
    body = await read_json(request, GenerateRequest, settings.max_body_bytes, settings.read_timeout)
    context = context_of(request.scope)
    if media_type == EVENTS:
        events = JobEvents(body.count)
        job = service.submit(body, context, previews, events.put)
        cancel, provenance = service.engine.cancel, service.provenance(job)
        return EventStream(job, events, cancel, provenance, body.scale, service.metrics)
    job = service.submit(body, context)
    try:
        images = await finish(service, request, job)
    except ClientGoneError:
        return client_gone(request.scope)
    return await _respond(service, job, images, media_type, body.scale, context)


async def _respond(
    service: Service, job: Job, images: list[Pixels], media_type: str, scale: int, context: RequestContext
) -> Response:
    encoders: dict[str, Encoder] = {JSON: partial(_encode_json, service, job), PNG: encode_sheet, ZIP: encode_zip}
    with service.metrics.encode_duration.time(), context.encoding():
        content = await asyncio.to_thread(encoders[media_type], images, service.provenance(job), scale)
    times = Timing.of(job.timings)
    phases = {"queue": times.queue_seconds, "denoise": times.denoise_seconds, "encode": context.encode_seconds}
    headers = {
        "X-Seed": str(job.request.options.seed),
        "Server-Timing": ", ".join(f"{phase};dur={1000 * duration:.3f}" for phase, duration in phases.items()),
    }
    return Response(content, media_type=media_type, headers=headers)


def _encode_json(service: Service, job: Job, images: list[Pixels], provenance: Provenance, scale: int) -> bytes:
    pngs = encode_images(images, provenance, scale)
    options = job.request.options
    answer = GenerateResponse(
        digit=options.digit,
        count=job.request.count,
        seed=options.seed,
        num_steps=options.num_steps,
        sampler=options.sampler,
        guidance_scale=options.guidance_scale,
        model=ModelName(name=options.model, sha256=service.info(options.model).sha256),
        images=[GeneratedImage(index=i, png=encode_base64(png)) for i, png in enumerate(pngs)],
        timing=Timing.of(job.timings),
    )
    return answer.model_dump_json().encode()
