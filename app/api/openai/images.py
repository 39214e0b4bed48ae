"""POST /v1/images/generations and POST /v1/images/edits: the OpenAI Images API."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from fastapi import Request
from starlette.responses import Response

from app.api.http.direct_route import DirectRoute
from app.api.http.events import StreamOptions
from app.api.http.idempotency import IdempotencyKey, with_seed
from app.api.http.media_types import EVENTS, JSON
from app.api.http.requests import parse_json, read_body, validate
from app.api.http.uploads import Reader
from app.api.openai.events import OpenAIEvents
from app.api.openai.operations import images_operation
from app.api.openai.plans import ImagePlan, plan_edit, plan_generation
from app.api.openai.prompt import description_of
from app.api.openai.schemas import (
    EDIT,
    GENERATION,
    CreatedImages,
    ImageData,
    ImageEditRequest,
    ImageGenerationRequest,
    ImagesRequest,
)
from app.api.operations import Router, picture
from app.api.service import Service, ServiceDependency, answer
from app.engine.job import Job, Pixels
from app.tasks.edit import EditFields, edit
from app.tasks.from_image import FittingFields, has_picture_tasks, read_drawing
from app.tasks.generate import GenerateFields, generate
from app.tasks.images import encode_base64, encode_images
from app.tasks.inpaint import InpaintFields, MaskedPicture, inpaint
from app.tasks.task import Task
from model.png import Provenance
from model.prepared_image import PreparedImage

router = Router(route_class=DirectRoute)

GENERATIONS_PATH, EDITS_PATH = "/v1/images/generations", "/v1/images/edits"
PREVIEW, DIGIT, EDITED = picture("preview"), picture("digit"), picture("edited")


@router.operation(
    images_operation(
        GENERATIONS_PATH,
        "create_images",
        "Generate images of the class in a prompt",
        ImageGenerationRequest,
        GENERATION,
        examples={
            "one": ("One digit", {"prompt": "a handwritten seven, please"}),
            "seed": ("A digit with a fixed seed", {"prompt": "7", "size": "28x28", "seed": 42}),
            "several": ("Several digits with fewer steps", {"prompt": "seven", "n": 4, "quality": "medium"}),
        },
        made=("A handwritten digit seven", PREVIEW, DIGIT),
    )
)
async def generations(request: Request, service: ServiceDependency, idempotency_key: IdempotencyKey) -> Response:
    """Generates images of the class that the prompt names, as in the OpenAI Images API."""
    settings = service.settings
    content = await read_body(request, settings.max_body_bytes, settings.read_timeout)
    body = validate(parse_json(content), ImageGenerationRequest)
    plan = plan_generation(body, service.models, settings.largest_request)
    fields = GenerateFields(label=plan.label, count=body.n, scale=plan.scale, **plan.fields)
    task = generate(plan.info, with_seed(fields, idempotency_key))
    return await _respond(request, service, body, plan, task, GENERATION)


@router.operation(
    images_operation(
        EDITS_PATH,
        "edit_images",
        "Redraw a picture, or fill in a part of it",
        ImageEditRequest,
        EDIT,
        examples={
            "edit": (
                "A 7 becomes a similar 9",
                {"image": PREVIEW, "prompt": "Make it a nine", "size": "28x28", "seed": 42},
            ),
            "mask": (
                "The transparent half is filled in",
                {"image": PREVIEW, "mask": picture("transparent_mask"), "prompt": "a nine", "seed": 42},
            ),
        },
        made=("A handwritten digit nine", PREVIEW, EDITED),
    )
)
async def edits(request: Request, service: ServiceDependency, idempotency_key: IdempotencyKey) -> Response:
    """Redraws a picture, or fills in the part under the transparent pixels of a mask, as in the OpenAI Images API."""
    masked = MaskedPicture(marks_by_transparency=True, complete=GENERATIONS_PATH)

    def check(body: ImageEditRequest) -> tuple[ImageEditRequest, ImagePlan]:
        return body, plan_edit(body, service.models, service.settings.largest_request, has_picture_tasks)

    def read_mask(checked: tuple[ImageEditRequest, ImagePlan], data: bytes) -> None:
        masked.read_mask((InpaintFields(), checked[1].info), data)

    def read_image(checked: tuple[ImageEditRequest, ImagePlan], data: bytes) -> PreparedImage:
        body, plan = checked
        if body.mask is None:
            return read_drawing((FittingFields(), plan.info), data)
        return masked.read_image((InpaintFields(), plan.info), data)

    readers: dict[str, Reader[tuple[ImageEditRequest, ImagePlan], PreparedImage | None]] = {
        "mask": read_mask,
        "image": read_image,
    }
    (body, plan), pictures = await service.pictures.read(request, ImageEditRequest, readers, check=check, lenient=True)
    (image,) = pictures["image"]
    assert image is not None, "the reader of the field `image` returns an image"
    fields = {"label": plan.label, "count": body.n, "scale": plan.scale, **plan.fields}
    if body.mask is None:
        task = edit(plan.info, with_seed(EditFields(**fields), idempotency_key), image)
    else:
        task = inpaint(plan.info, with_seed(InpaintFields(**fields), idempotency_key), image, masked.redrawn)
    return await _respond(request, service, body, plan, task, EDIT)


async def _respond(
    request: Request, service: Service, body: ImagesRequest, plan: ImagePlan, task: Task, kind: str
) -> Response:
    """Submits a task and returns its response. `kind` is the prefix of the types of its events.

    Raises the errors of `answer`.
    """
    # Previews are evenly spread. The last one is the image itself, which is not sent as a partial image.
    stream = StreamOptions(body.partial_images + 1 if body.partial_images else 0)
    media_type = EVENTS if body.stream else JSON
    return await answer(request, service, task, CreatedFormat(body, plan, kind), media_type, stream)


@dataclass(frozen=True, slots=True)
class CreatedFormat:
    """The formats of the images of a request. `kind` is the prefix of the types of its events."""

    body: ImagesRequest
    plan: ImagePlan
    kind: str

    def events(self, task: Task, provenance: Callable[[], Provenance]) -> OpenAIEvents:
        """Returns the format of the events of a stream."""
        facts = {"quality": self.plan.quality, "size": self.plan.size, "seed": task.options.seed}
        return OpenAIEvents(self.kind, facts, self.plan.scale, self.body.partial_images, provenance)

    def encode(self, media_type: str, task: Task, job: Job, images: list[Pixels], provenance: Provenance) -> bytes:
        """Returns the body of an answer in JSON. The text chunks of the images contain the provenance."""
        description = description_of(task.info, self.plan.label)
        response = CreatedImages(
            created=int(time.time()),
            data=[
                ImageData(b64_json=encode_base64(png), revised_prompt=description)
                for png in encode_images(images, provenance, task.scale)
            ],
            quality=self.plan.quality,
            size=self.plan.size,
            seed=provenance.seed,
            model=self.plan.info.name,
        )
        return response.model_dump_json().encode()
