"""POST /generate: generates digits and answers with JSON, PNG, ZIP or a stream of events."""

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from app.api.direct_route import DirectRoute
from app.api.generation import ServiceDependency, answer, guided_by_clip
from app.api.idempotency import IdempotencyKey, with_seed
from app.api.options import options_of, with_clip_options
from app.api.requests import negotiate, read_json
from app.api.responses import CLIP_ERRORS, ERRORS, FORMATS, IMAGE_FORMATS, JSON
from app.api.schemas import GenerateRequest, GenerateResponse
from app.api.stream_options import StreamOptionsDependency
from app.api.task import NO_CLIP, Task

router = APIRouter(route_class=DirectRoute)


@router.post(
    "/generate",
    operation_id="generate",
    response_class=JSONResponse,
    responses={
        200: {
            "model": GenerateResponse,
            "description": "the images, in the format that Accept selects",
            "content": IMAGE_FORMATS,
        },
        **ERRORS,
        **CLIP_ERRORS,
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
    stream: StreamOptionsDependency,
    idempotency_key: IdempotencyKey,
) -> Response:
    """Generates images of a digit. On a CPU the same request with the same seed gives the same bytes under any load.

    On a GPU such images may differ, depending on the load.
    """
    media_type = negotiate(request, FORMATS)
    settings = service.settings
    body = await read_json(request, GenerateRequest, settings.max_body_bytes, settings.read_timeout)
    body = with_seed(body, idempotency_key)
    info = service.info(body.model)
    options = with_clip_options(options_of(body, body.digit, info), body, info)
    task = Task(options, body.count, body.timeout_seconds, num_steps=options.num_steps, scale=body.scale, facts=NO_CLIP)
    task = await guided_by_clip(request, service, task)
    return await answer(request, service, task, media_type, stream)
