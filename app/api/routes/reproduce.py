"""POST /reproduce: generates a picture of this service again, and says whether it is identical."""

from dataclasses import replace

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api.direct_route import DirectRoute
from app.api.generation import ServiceDependency, encode_answer, encoded, guided_by_clip
from app.api.reproduction import Original, read_original
from app.api.requests import negotiate
from app.api.responses import JSON, PNG, PNG_FORMAT, picture_route
from app.api.task_schemas import ReproduceRequest, ReproduceResponse
from app.engine.job import DEFAULT_MODEL, Job, Pixels

router = APIRouter(route_class=DirectRoute)


@router.post(**picture_route("/reproduce", "reproduce", ReproduceRequest, ReproduceResponse, PNG_FORMAT))
async def reproduce(request: Request, service: ServiceDependency) -> Response:
    """Generates a picture of /generate again from its text chunks, and says whether the pixels are identical.

    If Accept selects image/png, the response is the newly generated picture. The header X-Identical is true or false.
    A picture gets 422 invalid_image if its text chunks are missing or malformed, if its checkpoint is not served, or if
    it was made from another picture.
    """
    media_type = negotiate(request, (JSON, PNG))

    def decode(data: bytes) -> Original:
        service.info(DEFAULT_MODEL)  # raises Starting if no model is loaded
        return read_original(
            data,
            service.engine.models,
            service.engine.clip.info if service.engine.clip else None,
            service.settings.largest_request,
        )

    def keep(body: ReproduceRequest, field: str, original: Original) -> Original:
        return original

    body, pictures = await service.pictures.read(request, ReproduceRequest, {"image": decode}, keep)
    (original,) = pictures["image"]
    task = await guided_by_clip(request, service, original.task(body.timeout_seconds))

    def compare_and_encode(job: Job, images: list[Pixels]) -> tuple[bytes, bool]:
        facts = original.compare(images)
        content = encode_answer(service, replace(task, facts={**task.facts, **facts}), media_type, job, images)
        return content, facts["identical"]

    (content, is_identical), server_timing = await encoded(request, service, task, compare_and_encode)
    headers = {
        "X-Seed": str(task.options.seed),
        "X-Identical": str(is_identical).lower(),
        "Server-Timing": server_timing,
    }
    return Response(content, media_type=media_type, headers=headers)
