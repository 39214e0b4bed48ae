"""GET /models: what each served model permits, and the limits of requests."""

from dataclasses import asdict

from fastapi import APIRouter
from starlette.responses import JSONResponse

from app.api import picture_tasks
from app.api.generation import ServiceDependency
from app.api.model_schemas import Evaluation, Limits, Models, ServedModel, Training
from app.api.responses import READ_ERRORS
from app.engine.interface import ModelInfo
from app.engine.job import DEFAULT_MODEL
from model.checkpoint import MOST_STEPS

router = APIRouter()

DECIMALS = 6  # of alpha_bar


@router.get("/models", operation_id="get_models", response_model=Models, responses=READ_ERRORS)
async def models(service: ServiceDependency) -> JSONResponse:
    """Returns the served models with the options that they permit, and the limits of requests."""
    service.info(DEFAULT_MODEL)  # raises the error while no model is loaded
    settings = service.settings
    answer = Models(
        models=[_describe(info) for info in service.engine.models.values()],
        limits=Limits(
            count=settings.largest_request,
            timeout_seconds=settings.longest_timeout,
            image_bytes=settings.max_image_bytes,
            queue_images=settings.queue_capacity,
        ),
    )
    clip = service.engine.clip
    content = {**answer.model_dump(exclude_none=True), "clip": asdict(clip.info) if clip else None}
    return JSONResponse(content, headers={"Cache-Control": "no-store"})


def _describe(info: ModelInfo) -> ServedModel:
    facts = info.training
    return ServedModel(
        name=info.name,
        sha256=info.sha256,
        num_parameters=info.num_parameters,
        image_shape=list(info.image_shape),
        num_classes=info.num_classes,
        max_steps=min(info.max_steps, MOST_STEPS),
        steps=list(info.steps),
        default_steps=info.default_steps,
        samplers=list(info.samplers),
        guidable=info.guidable,
        guidance_scale=info.guidance_scale,
        guidance_interval={sampler: list(interval) for sampler, interval in info.guidance_interval.items()},
        alpha_bar=[round(value, DECIMALS) for value in info.schedule.alpha_bar.tolist()],
        has_picture_tasks=picture_tasks.has_picture_tasks(info),
        training=Training(
            preset=facts.preset,
            data=facts.data,
            epochs=facts.epochs,
            evaluations=[Evaluation(**asdict(each)) for each in facts.evaluations],
        ),
        device=info.device,
        dtype=info.dtype,
        compiled=info.compiled,
    )
