"""POST /denoise: removes noise from a picture."""

from typing import Literal

from fastapi import Request
from pydantic import ConfigDict, Field
from starlette.responses import Response

from app.api.http.direct_route import DirectRoute
from app.api.http.events import StreamOptionsDependency
from app.api.http.idempotency import IdempotencyKey, with_seed
from app.api.http.media_types import FORMATS
from app.api.http.negotiation import negotiate
from app.api.http.picture_fields import Pictured
from app.api.native.answers import ImagesFormat
from app.api.native.examples import answer_with, stream_of
from app.api.native.operations import picture_operation
from app.api.native.schemas import ImagesResponse, PictureFacts
from app.api.operations import Router, picture
from app.api.service import ServiceDependency, answer
from app.tasks import denoise as tasks
from app.tasks.denoise import DenoiseFields, read_noisy

router = Router(route_class=DirectRoute)


class DenoiseRequest(DenoiseFields, Pictured):
    """The noisy picture to denoise."""

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                {
                    "if": {"properties": {"mode": {"const": "mean"}}, "required": ["mode"]},
                    "then": {"properties": {"num_steps": {"const": 1}, "guidance_scale": {"const": 1}}},
                }
            ]
        }
    )


class DenoiseResponse(PictureFacts, ImagesResponse):
    """The denoised images."""

    noise_std: float = Field(description="The standard deviation of the noise that was assumed, in grey levels.")
    mode: Literal["mean", "sample"]
    probabilities: list[float] | None = Field(
        description="The probability of each class given the noisy image, with 4 decimals. null if the service did "
        "not search for the class."
    )


NOISY = picture("noisy")  # "preview" with Gaussian noise of the standard deviation 50
DENOISED = answer_with(
    picture("denoised"),
    sampler="ddim",
    num_steps=20,
    guidance_scale=1.4,
    evaluations=5,
    noise_std=50.0,
    mode="sample",
    probabilities=[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.9964, 0.0, 0.0035],
)


@router.operation(
    picture_operation(
        "denoise",
        "Remove noise from a picture",
        DenoiseRequest,
        DenoiseResponse,
        examples={
            "sample": ("A sharp image, with a fixed seed", {"image": NOISY, "noise_std": 50, "seed": 42}),
            "mean": ("The image with the highest PSNR, in one network call", {"image": NOISY, "mode": "mean"}),
        },
        example=DENOISED,
        stream=stream_of(DENOISED, 2, 5),
    )
)
async def denoise(
    request: Request,
    service: ServiceDependency,
    stream: StreamOptionsDependency,
    idempotency_key: IdempotencyKey,
) -> Response:
    """Removes noise from a picture."""
    media_type = negotiate(request, FORMATS)
    (body, info), pictures = await service.pictures.read(
        request, DenoiseRequest, {"image": read_noisy}, check=service.with_model
    )
    ((image, noise_std),) = pictures["image"]
    task = tasks.denoise(info, with_seed(body, idempotency_key), image, noise_std)
    return await answer(request, service, task, ImagesFormat(DenoiseResponse), media_type, stream)
