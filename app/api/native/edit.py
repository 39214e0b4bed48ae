"""POST /edit: redraws a sketch."""

from fastapi import Request
from starlette.responses import Response

from app.api.http.direct_route import DirectRoute
from app.api.http.events import StreamOptionsDependency
from app.api.http.idempotency import IdempotencyKey, with_seed
from app.api.http.media_types import FORMATS
from app.api.http.negotiation import negotiate
from app.api.http.picture_fields import Pictured
from app.api.native.answers import ImagesFormat
from app.api.native.examples import PREVIEW, answer_with, stream_of
from app.api.native.operations import picture_operation
from app.api.native.schemas import ImagesResponse, PictureFacts
from app.api.operations import Router, picture
from app.api.service import ServiceDependency, answer
from app.tasks import edit as tasks
from app.tasks.edit import EditFields
from app.tasks.from_image import read_drawing

router = Router(route_class=DirectRoute)


class EditRequest(EditFields, Pictured):
    """The sketch to redraw."""


class EditResponse(PictureFacts, ImagesResponse):
    """Images that are similar to the sketch."""

    strength: float


EDITED = answer_with(picture("edited"), label="9", digit=9, evaluations=119, strength=0.6)


@router.operation(
    picture_operation(
        "edit",
        "Redraw a sketch as an image of a class",
        EditRequest,
        EditResponse,
        examples={
            "one": ("A 7 becomes a similar 9", {"image": PREVIEW, "digit": 9, "seed": 42}),
            "weak": ("The result is closer to the picture", {"image": PREVIEW, "strength": 0.4}),
        },
        example=EDITED,
        stream=stream_of(EDITED, 36, 73),
    )
)
async def edit(
    request: Request,
    service: ServiceDependency,
    stream: StreamOptionsDependency,
    idempotency_key: IdempotencyKey,
) -> Response:
    """Redraws a sketch as an image of a class that is similar to it."""
    media_type = negotiate(request, FORMATS)
    (body, info), pictures = await service.pictures.read(
        request, EditRequest, {"image": read_drawing}, check=service.with_model
    )
    task = tasks.edit(info, with_seed(body, idempotency_key), *pictures["image"])
    return await answer(request, service, task, ImagesFormat(EditResponse), media_type, stream)
