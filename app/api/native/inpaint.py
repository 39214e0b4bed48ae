"""POST /inpaint: fills in a part of a picture."""

from typing import Annotated

from fastapi import Request
from pydantic import Field
from starlette.responses import Response

from app.api.http.direct_route import DirectRoute
from app.api.http.events import StreamOptionsDependency
from app.api.http.idempotency import IdempotencyKey, with_seed
from app.api.http.media_types import FORMATS
from app.api.http.negotiation import negotiate
from app.api.http.picture_fields import Base64, Pictured
from app.api.native.answers import ImagesFormat
from app.api.native.examples import PREVIEW, answer_with, stream_of
from app.api.native.operations import picture_operation
from app.api.native.schemas import ImagesResponse, PictureFacts
from app.api.operations import Router, picture
from app.api.service import ServiceDependency, answer
from app.tasks import inpaint as tasks
from app.tasks.inpaint import InpaintFields, MaskedPicture

router = Router(route_class=DirectRoute)


class InpaintRequest(InpaintFields, Pictured):
    """The picture, and the mask of the part to fill in."""

    mask: Annotated[
        Base64,
        Field(description="A picture of the same size as `image`. White pixels are filled in, black pixels are kept."),
    ]


class InpaintResponse(PictureFacts, ImagesResponse):
    """Images that equal the picture outside of the mask."""


MASK = picture("mask")  # its lower half is white
INPAINTED = answer_with(picture("inpainted"), num_steps=10, guidance_scale=1.5, evaluations=113)


@router.operation(
    picture_operation(
        "inpaint",
        "Fill in a part of a picture",
        InpaintRequest,
        InpaintResponse,
        examples={
            "one": ("The lower half is filled in", {"image": PREVIEW, "mask": MASK, "seed": 42}),
            "digit": ("The same for a given digit", {"image": PREVIEW, "mask": MASK, "digit": 9}),
        },
        example=INPAINTED,
        stream=stream_of(INPAINTED, 36, 73),
        pictures=("image", "mask"),
    )
)
async def inpaint(
    request: Request,
    service: ServiceDependency,
    stream: StreamOptionsDependency,
    idempotency_key: IdempotencyKey,
) -> Response:
    """Fills in a part of a picture. The pixels outside of the mask are kept exactly."""
    media_type = negotiate(request, FORMATS)
    masked = MaskedPicture()
    readers = {"mask": masked.read_mask, "image": masked.read_image}
    (body, info), pictures = await service.pictures.read(request, InpaintRequest, readers, check=service.with_model)
    (image,) = pictures["image"]
    assert image is not None, "the reader of the field `image` returns an image"
    task = tasks.inpaint(info, with_seed(body, idempotency_key), image, masked.redrawn)
    return await answer(request, service, task, ImagesFormat(InpaintResponse), media_type, stream)
