"""POST /reproduce: generates a picture of this service again, and says whether it is identical."""

from dataclasses import replace
from typing import Annotated, Literal

from fastapi import Request
from pydantic import Field
from starlette.responses import Response

from app.api.http.direct_route import DirectRoute
from app.api.http.media_types import JSON, PNG
from app.api.http.negotiation import negotiate
from app.api.http.picture_fields import Base64
from app.api.native.answers import ImagesFormat
from app.api.native.examples import DIGIT, GENERATED
from app.api.native.operations import picture_operation
from app.api.native.schemas import GenerateResponse
from app.api.operations import BINARY, Router
from app.api.service import ServiceDependency, encoded, guided_by_clip
from app.engine.job import Job, Pixels
from app.tasks.reproduce import Original, read_original
from app.tasks.sampling import TimedFields

router = Router(route_class=DirectRoute)


class ReproduceRequest(TimedFields):
    """The picture of this service to generate again."""

    image: Annotated[
        Base64,
        Field(
            description="A PNG file of /generate, /v1/images/generations or scripts.sample with its text chunks, as a "
            "file in multipart/form-data or as base64 in JSON. It shows one image, or several images of one class."
        ),
    ]


class ReproduceResponse(GenerateResponse):
    """The newly generated images, and whether they are identical to the picture."""

    identical: bool = Field(description="True if every pixel of the picture is the same.")
    reason: Literal["other_release", "other_pixels"] | None = Field(
        description="null if the picture is identical. other_release: its text chunk Software names another release. "
        "other_pixels: it names this release. The device, the precision or the compile mode differ, or the picture was "
        "altered."
    )
    different_pixels: int = Field(
        description="Number of pixels that differ, before the enlargement by `scale`. An enlarged pixel differs if any "
        "part of it differs."
    )
    largest_difference: int = Field(description="The largest difference of a pixel, in grey levels of 0 to 255.")


@router.operation(
    picture_operation(
        "reproduce",
        "Generate a picture of this service again",
        ReproduceRequest,
        ReproduceResponse,
        examples={"one": ("A picture that this service generated", {"image": DIGIT})},
        example={**GENERATED, "identical": True, "reason": None, "different_pixels": 0, "largest_difference": 0},
        formats={PNG: BINARY},
    )
)
async def reproduce(request: Request, service: ServiceDependency) -> Response:
    """Generates a picture of /generate again from its text chunks, and says whether the pixels are identical.

    If Accept selects image/png, the response is the newly generated picture. The header X-Identical is true or false.
    A picture gets 422 invalid_image if its text chunks are missing or malformed, if its checkpoint is not served, or if
    it was made from another picture.
    """
    media_type = negotiate(request, (JSON, PNG))

    def read(body: ReproduceRequest, data: bytes) -> Original:
        return read_original(
            data,
            service.models,
            service.engine.clip.info if service.engine.clip else None,
            service.settings.largest_request,
            body.timeout_seconds,
        )

    _, pictures = await service.pictures.read(request, ReproduceRequest, {"image": read})
    (original,) = pictures["image"]
    task = await guided_by_clip(request, service, original.task)

    def compare_and_encode(job: Job, images: list[Pixels]) -> tuple[bytes, bool]:
        facts = original.compare(images)
        compared = replace(task, facts={**task.facts, **facts})
        provenance = service.provenance(task, job)
        content = ImagesFormat(ReproduceResponse).encode(media_type, compared, job, images, provenance)
        return content, facts["identical"]

    (content, is_identical), server_timing = await encoded(request, service, task, compare_and_encode)
    headers = {
        "X-Seed": str(task.options.seed),
        "X-Identical": str(is_identical).lower(),
        "Server-Timing": server_timing,
    }
    return Response(content, media_type=media_type, headers=headers)
