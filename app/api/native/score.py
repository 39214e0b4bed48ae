"""POST /score: compares pictures with prompts by CLIP."""

import asyncio
from typing import Annotated

import numpy as np
from fastapi import Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from app import errors
from app.api.http.context import context_of
from app.api.http.direct_route import DirectRoute
from app.api.http.media_types import JSON
from app.api.http.negotiation import negotiate
from app.api.http.picture_fields import PICTURE, Base64
from app.api.http.requests import cancel_on_disconnect
from app.api.native.examples import CLIP, PREVIEW
from app.api.native.operations import CLIP_STATUSES, PICTURE_STATUSES, picture_operation
from app.api.native.schemas import ModelName, seconds_of
from app.api.operations import Router, picture
from app.api.service import ServiceDependency
from app.engine.clip_worker import Similarities
from app.engine.interface import ModelInfo
from app.engine.job import Pixels
from app.tasks.clip_warnings import score_warning
from app.tasks.fields import AppliedFit
from app.tasks.from_image import check_fit
from app.tasks.score import MAX_IMAGES, ScoreFields, SeveralPictures
from model.prepared_image import PreparedImage

router = Router(route_class=DirectRoute)

LATE = "The pictures were not scored before the deadline. Send fewer pictures, or request a longer timeout"
DECIMALS = 6  # of a similarity


class ScoreRequest(ScoreFields):
    """The pictures and the prompts to compare."""

    images: Annotated[
        list[Annotated[Base64, Field(description=PICTURE)]],
        Field(min_length=1, max_length=MAX_IMAGES, description="The pictures."),
    ]


class ScoredImage(BaseModel):
    """How a picture was changed before it was scored."""

    fit: AppliedFit
    inverted: bool


class RealDigits(BaseModel):
    """The similarities of real digits: images of MNIST's test split, the same number of each class."""

    count: int = Field(description="Number of real digits.")
    similarities: list[list[float]] = Field(
        description="For each prompt: the mean similarity of the real digits of each class, 0 to 9."
    )


class ScoreTiming(BaseModel):
    """Seconds that the request waited in the queue, that CLIP took for it, and that it took in total."""

    queue_seconds: float
    embed_seconds: float
    total_seconds: float


class ScoreResponse(BaseModel):
    """The similarity of each picture and each prompt."""

    clip: ModelName
    prompts: list[str]
    similarities: list[list[float]] = Field(
        description="For each picture: its cosine similarity to each prompt, with 6 decimals."
    )
    images: list[ScoredImage] = Field(description="How each picture was changed.")
    real_digits: RealDigits
    warning: str | None = Field(
        description="Names the words that the model has not learned, and the pictures that no prompt describes. "
        "Otherwise null."
    )
    timing: ScoreTiming


PROMPTS = ["a handwritten digit seven", "a handwritten digit nine"]
SCORED = {  # the similarities of the shipped CLIP model
    "clip": CLIP,
    "prompts": PROMPTS,
    "similarities": [[0.259675, -0.22986]],
    "images": [{"fit": "resize", "inverted": False}],
    "real_digits": {
        "count": 100,
        "similarities": [
            [
                *(-0.233392, -0.250272, -0.214521, -0.272062, -0.236289),
                *(-0.346008, -0.266208, 0.25011, -0.298515, -0.231789),
            ],
            [
                *(-0.223309, -0.284513, -0.275496, -0.229841, -0.287919),
                *(-0.207839, -0.288904, -0.247283, -0.220645, 0.199767),
            ],
        ],
    },
    "warning": None,
    "timing": {"queue_seconds": 0.000152, "embed_seconds": 0.002766, "total_seconds": 0.007951},
}


@router.operation(
    picture_operation(
        "score",
        "Compare pictures with prompts by CLIP",
        ScoreRequest,
        ScoreResponse,
        examples={
            "one": ("One picture and two prompts", {"images": [PREVIEW], "prompts": PROMPTS}),
            "several": (
                "Several pictures and one prompt",
                {"images": [PREVIEW, picture("edited")], "prompts": PROMPTS[:1]},
            ),
        },
        example=SCORED,
        statuses={**PICTURE_STATUSES, **CLIP_STATUSES},
        pictures=("images",),
    )
)
async def score(request: Request, service: ServiceDependency) -> Response:
    """Returns the cosine similarity of each picture and each prompt, and the mean similarities of real digits.

    CLIP uses only the CPU time that the denoising steps leave.
    """
    negotiate(request, (JSON,))

    def check(body: ScoreRequest) -> tuple[ScoreRequest, ModelInfo]:
        timeout = service.timeout_of(body.timeout_seconds)
        _ = service.clip_info  # raises NotAvailable without a CLIP model
        # Refuses a request before its pictures are decoded. `service.score` checks again: others can be admitted first.
        service.clip.check_admission(len(body.images), body.prompts, timeout)
        info = service.info()
        check_fit(info, body)
        return body, info

    (body, _), pictures = await service.pictures.read(
        request, ScoreRequest, {"images": SeveralPictures().read}, check=check
    )
    images, timeout = pictures["images"], service.timeout_of(body.timeout_seconds)
    pixels = [_pixels_of(image) for image in images]
    future = service.score(pixels, body.prompts, timeout, context_of(request.scope))
    try:
        async with asyncio.timeout(timeout):
            scores = await cancel_on_disconnect(request, asyncio.wrap_future(future))
    except TimeoutError:
        raise errors.DeadlineExceeded(LATE) from None
    finally:
        future.cancel()
    assert service.engine.clip
    unknown = await asyncio.to_thread(service.engine.clip.unknown_words, body.prompts)
    queue, embed, total = seconds_of(scores.timings)
    response = ScoreResponse(
        clip=ModelName(name=service.clip_info.name, sha256=service.clip_info.sha256),
        prompts=body.prompts,
        similarities=_rounded(scores.similarities),
        images=[_facts(image) for image in images],
        real_digits=RealDigits(count=scores.num_real_digits, similarities=_rounded(scores.real_digits)),
        warning=score_warning(scores, unknown),
        timing=ScoreTiming(queue_seconds=queue, embed_seconds=embed, total_seconds=total),
    )
    phases = f"queue;dur={1000 * queue:.3f}, embed;dur={1000 * embed:.3f}"
    return Response(response.model_dump_json(), media_type=JSON, headers={"Server-Timing": phases})


def _pixels_of(image: PreparedImage) -> Pixels:
    """Returns the pixels (H, W) or (H, W, 3) of an image."""
    channels = image.pixels.numpy()  # (C, H, W)
    return channels[0] if len(channels) == 1 else np.moveaxis(channels, 0, -1)


def _facts(image: PreparedImage) -> ScoredImage:
    return ScoredImage(fit=image.fit, inverted=image.inverted)


def _rounded(similarities: Similarities) -> list[list[float]]:
    return [[round(value, DECIMALS) for value in row] for row in similarities.tolist()]
