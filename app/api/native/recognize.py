"""POST /recognize: recognises the class of a picture."""

import asyncio

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
from app.tasks import recognize as tasks
from app.tasks.error_chart import encode_error_chart
from app.tasks.fields import AppliedFit
from app.tasks.from_image import read_drawing
from app.tasks.recognize import RecognizeFields
from app.tasks.task import Task
from model.png import SOFTWARE
from model.recognition import Recognition

router = Router(route_class=DirectRoute)


class RecognizeRequest(RecognizeFields, Pictured):
    """The picture to recognise."""


class RecognizeResponse(BaseModel):
    """The recognised class."""

    label: str = Field(description="The name of the class.")
    digit: int | None = Field(description="The digit, or null if the classes of the model are not digits.")
    probabilities: list[float] = Field(
        description="The probability of each class, if the picture shows one of them. The order is that of the class "
        "names in GET /models."
    )
    is_digit: bool | None = Field(
        description="false if the picture probably shows no digit. This is wrong for about 1.5% of MNIST's test "
        "digits. null if the classes of the model are not digits."
    )
    evaluations: int = Field(description="Number of network evaluations.")
    num_pairs: int
    model: ModelName
    fit: AppliedFit
    invert: bool
    timing: Timing


RECOGNISED = {
    "label": "7",
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
        "Recognise the class of a picture",
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
    """Recognises the class of a picture, such as the digit that it shows.

    The service adds noise to the picture. The answer is the class with which the network removes this noise best. If
    Accept selects image/png, the response is a chart of the errors of each class.
    """
    media_type = negotiate(request, (JSON, PNG))
    (body, info), pictures = await service.pictures.read(
        request, RecognizeRequest, {"image": read_drawing}, check=service.with_model
    )
    (image,) = pictures["image"]
    task, context = tasks.recognize(info, body, image), context_of(request.scope)
    job = service.submit(task, context)
    (result,) = await finish(service, request, job)
    assert isinstance(result, Recognition), "a recognition task has this result"
    if media_type == PNG:
        with context.encoding(service.metrics):
            content = await asyncio.to_thread(
                encode_error_chart, result, info.class_names, _chunks_of_chart(task, result)
            )
        return Response(content, media_type=PNG, headers={"Server-Timing": server_timing(job, context)})
    response = RecognizeResponse(
        **task.class_facts(result.label),
        probabilities=result.probabilities,
        is_digit=result.is_digit if info.has_digits else None,
        evaluations=result.evaluations,
        model=ModelName(name=info.name, sha256=info.sha256),
        timing=Timing.of(job.timings),
        **task.facts,
    )
    headers = {"Server-Timing": server_timing(job, context)}
    return Response(response.model_dump_json(), media_type=JSON, headers=headers)


def _chunks_of_chart(task: Task, result: Recognition) -> dict[str, str]:
    """Returns the text chunks of a chart."""
    provenance = task.provenance(result.label)
    return {"Software": SOFTWARE, **provenance.class_text(), "Model-SHA256": task.info.sha256, **task.chunks}
