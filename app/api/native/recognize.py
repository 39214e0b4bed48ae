"""POST /recognize: recognises the digit in a picture."""

import asyncio
from collections.abc import Mapping

from fastapi import Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from app.api.http.context import context_of
from app.api.http.direct_route import DirectRoute
from app.api.http.media_types import JSON, PNG
from app.api.http.negotiation import negotiate
from app.api.http.picture_fields import Pictured
from app.api.native.examples import FIT, PREVIEW, SHA256, TIMING
from app.api.native.operations import picture_operation
from app.api.native.schemas import ModelName, Timing
from app.api.operations import BINARY, Router
from app.api.service import ServiceDependency, finish, server_timing
from app.engine.interface import ModelInfo
from app.tasks import recognize as tasks
from app.tasks.error_chart import encode_error_chart
from app.tasks.fields import AppliedFit
from app.tasks.from_image import read_drawing
from app.tasks.recognize import RecognizeFields
from model.png import SOFTWARE
from model.recognition import Recognition

router = Router(route_class=DirectRoute)


class RecognizeRequest(RecognizeFields, Pictured):
    """The picture to recognise."""


class RecognizeResponse(BaseModel):
    """The recognised digit."""

    digit: int
    probabilities: list[float] = Field(description="The probability of each digit, if the picture shows a digit.")
    is_digit: bool = Field(
        description="false if the picture probably shows no digit. This is wrong for about 1.5% of MNIST's test digits."
    )
    evaluations: int = Field(description="Number of network evaluations.")
    num_pairs: int
    model: ModelName
    fit: AppliedFit
    invert: bool
    timing: Timing


RECOGNISED = {
    "digit": 7,
    "probabilities": [0.0, 0.0, 0.0001, 0.0002, 0.0, 0.0, 0.0, 0.9995, 0.0001, 0.0],
    "is_digit": True,
    "evaluations": 23,
    "num_pairs": 20,
    "model": {"name": "default", "sha256": SHA256},
    **FIT,
    "timing": TIMING,
}


@router.operation(
    picture_operation(
        "recognize",
        "Recognise the digit in a picture",
        RecognizeRequest,
        RecognizeResponse,
        examples={
            "one": ("A picture of a digit", {"image": PREVIEW}),
            "accurate": ("More pairs, which is slower and more accurate", {"image": PREVIEW, "num_pairs": 50}),
        },
        example=RECOGNISED,
        formats={PNG: BINARY},
    )
)
async def recognize(request: Request, service: ServiceDependency) -> Response:
    """Recognises the digit in a picture.

    The service adds noise to the picture. The digit is the class with which the network removes this noise best. If
    Accept selects image/png, the response is a chart of the errors of each class.
    """
    media_type = negotiate(request, (JSON, PNG))
    body, pictures = await service.pictures.read(
        request, RecognizeRequest, {"image": read_drawing}, check=service.picture_model
    )
    (image,) = pictures["image"]
    task, context = tasks.recognize(service.picture_model(body), body, image), context_of(request.scope)
    job = service.submit(task, context)
    (result,) = await finish(service, request, job)
    assert isinstance(result, Recognition), "a recognition task has this result"
    info = service.info(body.model)
    if media_type == PNG:
        with context.encoding(service.metrics):
            content = await asyncio.to_thread(encode_error_chart, result, _chart_chunks(result, info, task.chunks))
        return Response(content, media_type=PNG, headers={"Server-Timing": server_timing(job, context)})
    response = RecognizeResponse(
        digit=result.label,
        probabilities=result.probabilities,
        is_digit=result.is_digit,
        evaluations=result.evaluations,
        model=ModelName(name=info.name, sha256=info.sha256),
        timing=Timing.of(job.timings),
        **task.facts,
    )
    headers = {"Server-Timing": server_timing(job, context)}
    return Response(response.model_dump_json(), media_type=JSON, headers=headers)


def _chart_chunks(result: Recognition, info: ModelInfo, chunks: Mapping[str, str]) -> dict[str, str]:
    """Returns the text chunks of a chart."""
    return {"Software": SOFTWARE, "Digit": str(result.label), "Model-SHA256": info.sha256, **chunks}
