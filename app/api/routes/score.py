"""POST /score: compares pictures with prompts by CLIP."""

import asyncio
import time

from fastapi import APIRouter, Request
from starlette.responses import Response

from app import errors
from app.api.clip_warnings import score_warning
from app.api.context import context_of
from app.api.direct_route import DirectRoute
from app.api.generation import ServiceDependency
from app.api.picture_tasks import SeveralPictures
from app.api.pictures import decode
from app.api.requests import cancel_on_disconnect, negotiate
from app.api.responses import JSON, picture_route
from app.api.schemas import ClipName
from app.api.score_schemas import DECIMALS, RealDigits, ScoredImage, ScoreRequest, ScoreResponse, ScoreTiming
from app.engine.clip_worker import Scores, Similarities
from model.digit_image import DigitImage

router = APIRouter(route_class=DirectRoute)

LATE = "The pictures were not scored before the deadline. Send fewer pictures, or request a longer timeout"


@router.post(**picture_route("/score", "score", ScoreRequest, ScoreResponse, {}, needs_clip=True))
async def score(request: Request, service: ServiceDependency) -> Response:
    """Returns the cosine similarity of each picture and each prompt, and the mean similarities of real digits.

    CLIP uses only the CPU time that the denoising steps leave.
    """
    negotiate(request, (JSON,))

    def check(body: ScoreRequest) -> None:
        timeout = service.timeout_of(body.timeout_seconds)
        _ = service.clip_info  # raises NotAvailable without a CLIP model
        # The pictures of a refused request are not decoded. `service.score` checks again, as other requests may follow.
        service.clip.check_admission(len(body.images), body.prompts, timeout)

    body, pictures = await service.pictures.read(
        request, ScoreRequest, {"images": decode}, SeveralPictures().fit, check=check
    )
    images, timeout = pictures["images"], service.timeout_of(body.timeout_seconds)
    pixels = [image.pixels[0].numpy() for image in images]
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
    timing = _timing(scores)
    response = ScoreResponse(
        clip=ClipName(name=service.clip_info.name, sha256=service.clip_info.sha256),
        prompts=body.prompts,
        similarities=_rounded(scores.similarities),
        images=[_facts(image) for image in images],
        real_digits=RealDigits(count=scores.num_real_digits, similarities=_rounded(scores.real_digits)),
        warning=score_warning(scores, unknown),
        timing=timing,
    )
    phases = f"queue;dur={1000 * timing.queue_seconds:.3f}, embed;dur={1000 * timing.embed_seconds:.3f}"
    return Response(response.model_dump_json(), media_type=JSON, headers={"Server-Timing": phases})


def _facts(image: DigitImage) -> ScoredImage:
    return ScoredImage(fit=image.fit, inverted=image.inverted)


def _rounded(similarities: Similarities) -> list[list[float]]:
    return [[round(value, DECIMALS) for value in row] for row in similarities.tolist()]


def _timing(scores: Scores) -> ScoreTiming:
    """Returns the times of finished work. The total time ends with this call."""
    return ScoreTiming(
        queue_seconds=round(scores.started_at - scores.submitted_at, 6),
        embed_seconds=round(scores.finished_at - scores.started_at, 6),
        total_seconds=round(time.monotonic() - scores.submitted_at, 6),
    )
