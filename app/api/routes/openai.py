"""POST /v1/images/generations and POST /v1/images/edits: the OpenAI Images API."""

from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from app.api import picture_tasks
from app.api.direct_route import DirectRoute
from app.api.generation import Service, ServiceDependency, event_stream, finished_response
from app.api.idempotency import IdempotencyKey, with_seed
from app.api.openai.document import EDITS, EDITS_PATH, GENERATIONS, GENERATIONS_PATH
from app.api.openai.events import OpenAIEvents
from app.api.openai.options import Plan, plan_edit, plan_generation
from app.api.openai.responses import encode_created
from app.api.openai.schemas import (
    EDIT,
    GENERATION,
    ImageEditRequest,
    ImageGenerationRequest,
    ImagesRequest,
)
from app.api.options import options_of
from app.api.pictures import Picture, decode, decode_transparency
from app.api.requests import parse_json, read_body, validate
from app.api.responses import JSON
from app.api.schemas import GenerateRequest
from app.api.stream_options import StreamOptions
from app.api.task import Task
from app.api.task_schemas import EditRequest, InpaintRequest
from app.engine.interface import ModelInfo
from app.engine.job import DEFAULT_MODEL, Job, Pixels
from model.digit_image import DigitImage

router = APIRouter(route_class=DirectRoute)


@router.post(GENERATIONS_PATH, operation_id="create_images", response_class=JSONResponse, **GENERATIONS)
async def generations(request: Request, service: ServiceDependency, idempotency_key: IdempotencyKey) -> Response:
    """Generates images of the digit that the prompt names, as in the OpenAI Images API."""
    settings = service.settings
    content = await read_body(request, settings.max_body_bytes, settings.read_timeout)
    body = validate(parse_json(content), ImageGenerationRequest)
    plan = plan_generation(body, _models(service), settings.largest_request)
    sampling = GenerateRequest(digit=body.digit, count=body.n, scale=plan.scale, model=plan.info.name, **plan.fields)
    options = options_of(with_seed(sampling, idempotency_key), body.digit, plan.info)
    task = Task(options, body.n, num_steps=options.num_steps, scale=plan.scale)
    return await _respond(request, service, body, plan, task, GENERATION)


@router.post(EDITS_PATH, operation_id="edit_images", response_class=JSONResponse, **EDITS)
async def edits(request: Request, service: ServiceDependency, idempotency_key: IdempotencyKey) -> Response:
    """Redraws a picture, or fills in the part under the transparent pixels of a mask, as in the OpenAI Images API."""
    masked = picture_tasks.MaskedPicture("transparent", GENERATIONS_PATH)

    def plan_of(body: ImageEditRequest) -> Plan:
        return plan_edit(body, _models(service), service.settings.largest_request, picture_tasks.has_picture_tasks)

    def convert(body: ImageEditRequest, field: str, picture: Picture) -> DigitImage | None:
        if body.mask is None:
            return picture_tasks.fit_digit(EditRequest(image=""), field, picture)
        return masked.fit(InpaintRequest(image="", mask=""), field, picture)

    decoders = {"mask": decode_transparency, "image": decode}
    body, pictures = await service.pictures.read(
        request, ImageEditRequest, decoders, convert, check=plan_of, lenient=True
    )
    (image,) = pictures["image"]
    assert image is not None, "the conversion of the field `image` returns an image"
    plan = plan_of(body)
    fields = {"digit": body.digit, "count": body.n, "scale": plan.scale, "model": plan.info.name, **plan.fields}
    if body.mask is None:
        edited = with_seed(EditRequest(image="", **fields), idempotency_key)
        task = picture_tasks.edit(plan.info, edited, image)
    else:
        filled = with_seed(InpaintRequest(image="", mask="", **fields), idempotency_key)
        task = picture_tasks.inpaint(plan.info, filled, image, masked.redrawn)
    return await _respond(request, service, body, plan, task, EDIT)


async def _respond(
    request: Request, service: Service, body: ImagesRequest, plan: Plan, task: Task, kind: str
) -> Response:
    """Submits a task and returns its response. `kind` is the prefix of the types of its events.

    Raises the errors of Service.submit and of finish.
    """
    if body.stream:
        facts = {"quality": plan.quality, "size": plan.size, "seed": task.options.seed}

        def events_of(job: Job) -> OpenAIEvents:
            return OpenAIEvents(kind, facts, plan.scale, body.partial_images, partial(service.provenance, task, job))

        # Previews are evenly spread. The last one is the image itself, which is not sent as a partial image.
        stream = StreamOptions(body.partial_images + 1 if body.partial_images else 0)
        return event_stream(request, service, task, stream, events_of)

    def encode(job: Job, images: list[Pixels]) -> bytes:
        return encode_created(images, service.provenance(task, job), body.digit, plan)

    return await finished_response(request, service, task, encode, JSON)


def _models(service: Service) -> dict[str, ModelInfo]:
    """Returns the served models by name. Raises Starting or EngineFailed if no model is loaded."""
    service.info(DEFAULT_MODEL)
    return service.engine.models
