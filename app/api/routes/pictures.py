"""POST /denoise, /inpaint, /edit and /recognize: tasks that start from a picture of the client."""

import asyncio
from collections.abc import Mapping
from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api import picture_tasks
from app.api.context import context_of
from app.api.direct_route import DirectRoute
from app.api.error_chart import encode_error_chart
from app.api.generation import Service, ServiceDependency, answer, finish, server_timing
from app.api.idempotency import IdempotencyKey, with_seed
from app.api.pictures import decode, decode_mask
from app.api.requests import negotiate
from app.api.responses import FORMATS, JSON, PNG, PNG_FORMAT, picture_route
from app.api.schemas import BaseRequest, ModelName, Timing
from app.api.stream_options import StreamOptionsDependency
from app.api.task_schemas import (
    DenoiseRequest,
    DenoiseResponse,
    EditRequest,
    EditResponse,
    InpaintRequest,
    InpaintResponse,
    RecognizeRequest,
    RecognizeResponse,
)
from app.engine.interface import ModelInfo
from model.png import SOFTWARE
from model.recognition import Recognition

router = APIRouter(route_class=DirectRoute)


def _model(service: Service, body: BaseRequest) -> ModelInfo:
    """Returns the model of a request. Raises InvalidRequest if it supports only /generate."""
    return picture_tasks.check_model(service.info(body.model))


@router.post(**picture_route("/recognize", "recognize", RecognizeRequest, RecognizeResponse, PNG_FORMAT))
async def recognize(request: Request, service: ServiceDependency) -> Response:
    """Recognises the digit in a picture.

    The service adds noise to the picture. The digit is the class with which the network removes this noise best. If
    Accept selects image/png, the response is a chart of the errors of each class.
    """
    media_type = negotiate(request, (JSON, PNG))
    body, pictures = await service.pictures.read(
        request, RecognizeRequest, {"image": decode}, picture_tasks.fit_digit, check=partial(_model, service)
    )
    (image,) = pictures["image"]
    task, context = picture_tasks.recognize(_model(service, body), body, image), context_of(request.scope)
    job = service.submit(task, context)
    (result,) = await finish(service, request, job)
    assert isinstance(result, Recognition), "a recognition task has this result"
    info = service.info(body.model)
    if media_type == PNG:
        with context.encoding(service.metrics):
            content = await asyncio.to_thread(encode_error_chart, result, _chart_chunks(result, info, task.chunks))
        return Response(content, media_type=PNG, headers={"Server-Timing": server_timing(job, context)})
    response = RecognizeResponse(
        digit=result.digit,
        probabilities=result.probabilities,
        is_digit=result.is_digit,
        evaluations=result.evaluations,
        num_pairs=body.num_pairs,
        model=ModelName(name=info.name, sha256=info.sha256),
        fit=image.fit,
        invert=image.inverted,
        timing=Timing.of(job.timings),
    )
    headers = {"Server-Timing": server_timing(job, context)}
    return Response(response.model_dump_json(), media_type=JSON, headers=headers)


def _chart_chunks(result: Recognition, info: ModelInfo, chunks: Mapping[str, str]) -> dict[str, str]:
    """Returns the text chunks of a chart."""
    return {"Software": SOFTWARE, "Digit": str(result.digit), "Model-SHA256": info.sha256, **chunks}


@router.post(**picture_route("/denoise", "denoise", DenoiseRequest, DenoiseResponse))
async def denoise(
    request: Request,
    service: ServiceDependency,
    stream: StreamOptionsDependency,
    idempotency_key: IdempotencyKey,
) -> Response:
    """Removes noise from a picture of a digit."""
    media_type = negotiate(request, FORMATS)
    body, pictures = await service.pictures.read(
        request, DenoiseRequest, {"image": decode}, picture_tasks.estimate_noise, check=partial(_model, service)
    )
    ((image, noise_std),) = pictures["image"]
    task = picture_tasks.denoise(_model(service, body), with_seed(body, idempotency_key), image, noise_std)
    return await answer(request, service, task, media_type, stream)


@router.post(**picture_route("/inpaint", "inpaint", InpaintRequest, InpaintResponse))
async def inpaint(
    request: Request,
    service: ServiceDependency,
    stream: StreamOptionsDependency,
    idempotency_key: IdempotencyKey,
) -> Response:
    """Fills in a part of a picture. The pixels outside of the mask are kept exactly."""
    media_type = negotiate(request, FORMATS)
    masked = picture_tasks.MaskedPicture()
    body, pictures = await service.pictures.read(
        request, InpaintRequest, {"mask": decode_mask, "image": decode}, masked.fit, check=partial(_model, service)
    )
    (image,) = pictures["image"]
    assert image is not None, "the conversion of the field `image` returns an image"
    task = picture_tasks.inpaint(_model(service, body), with_seed(body, idempotency_key), image, masked.redrawn)
    return await answer(request, service, task, media_type, stream)


@router.post(**picture_route("/edit", "edit", EditRequest, EditResponse))
async def edit(
    request: Request,
    service: ServiceDependency,
    stream: StreamOptionsDependency,
    idempotency_key: IdempotencyKey,
) -> Response:
    """Redraws a sketch as a digit that is similar to it."""
    media_type = negotiate(request, FORMATS)
    body, pictures = await service.pictures.read(
        request, EditRequest, {"image": decode}, picture_tasks.fit_digit, check=partial(_model, service)
    )
    task = picture_tasks.edit(_model(service, body), with_seed(body, idempotency_key), *pictures["image"])
    return await answer(request, service, task, media_type, stream)
