"""What the operations of the OpenAI Images API have in common: their errors, and the limits of their requests."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from app.api.http.events import event_text
from app.api.http.media_types import EVENTS, MULTIPART
from app.api.openai.plans import OPENAI_MODELS, size_name
from app.api.openai.prompt import HOW
from app.api.openai.schemas import (
    AUTO,
    MAX_IMAGES,
    UNSUPPORTED,
    CompletedImage,
    CreatedImages,
    ImageData,
    ImagesRequest,
    OpenAIError,
    PartialImage,
)
from app.api.operations import (
    IMAGE_TOO_LARGE,
    REF,
    STATUS,
    Offer,
    Operation,
    Schema,
    Stream,
    body_of,
    change_examples,
    default_of,
    form_schema,
)
from app.errors import BodyTooLarge, InvalidImage, InvalidRequest
from app.tasks.from_image import has_picture_tasks
from app.tasks.picture_files import damaged
from app.tasks.sampling import max_scale_of

GROUP = "OpenAI"
_INVALID = "invalid_request: `param` names a field that is missing, unknown, invalid or not permitted by the model"
_WORK = {status: STATUS[status] for status in (400, 401, 403, 408, 413, 429, 431, 500, 503, 504)}
GENERATION_STATUSES = {**_WORK, 400: f"malformed_json, malformed_request. {_INVALID}"}
EDIT_STATUSES = {
    **_WORK,
    400: "malformed_json, malformed_request. invalid_image: `param` names a picture that cannot be decoded. "
    f"{_INVALID}",
    413: IMAGE_TOO_LARGE,
}
CREATED_AT = 1_790_000_000
_FACTS: dict[str, Any] = {"quality": "high", "size": "28x28", "seed": 42}
_SIDE = 28  # pixels per side of the images of a model that is not known yet


def images_operation(
    path: str,
    name: str,
    summary: str,
    request: type[ImagesRequest],
    kind: str,
    *,
    examples: Mapping[str, tuple[str, Schema]],
    made: tuple[str, str, str],
) -> Operation:
    """Returns the operation that makes images. `kind` is the prefix of the types of its events.

    `made` has the revised prompt, the preview and the image of the example of an answer.
    """
    revised, preview, png = made
    with_pictures = "image" in request.model_fields
    stream = Stream(
        "ImageEditStreamEvent" if with_pictures else "ImageGenerationStreamEvent",
        f"of a stream of {path}.",
        {f"{kind}.partial_image": PartialImage, f"{kind}.completed": CompletedImage, "error": OpenAIError},
    )
    created = CreatedImages(
        created=CREATED_AT,
        data=[ImageData(b64_json=png, revised_prompt=revised)],
        model="default",
        **_FACTS,
    )
    return Operation(
        path=path,
        name=name,
        group=GROUP,
        summary=summary,
        method="POST",
        answer=CreatedImages,
        example=created.model_dump(),
        description="the images, or a stream of events if `stream` is true",
        formats={EVENTS: stream.content(_stream(kind, preview, png))},
        stream=stream,
        body=body_of(request, examples, ("image", "mask") if with_pictures else ()),
        error=OpenAIError,
        statuses=EDIT_STATUSES if with_pictures else GENERATION_STATUSES,
        errors=[
            BodyTooLarge(default_of("max_image_bytes" if with_pictures else "max_body_bytes")),
            InvalidRequest.of("prompt", f"The prompt names no digit. {HOW}"),
            InvalidImage.of("image", str(damaged("PNG"))),
        ],
        complete=partial(_schemas, request),
    )


def _stream(kind: str, preview: str, png: str) -> str:
    common: dict[str, Any] = {"created_at": CREATED_AT, "index": 0, **_FACTS}
    partial_image = PartialImage(b64_json=preview, partial_image_index=0, **common | {"type": f"{kind}.partial_image"})
    completed = CompletedImage(b64_json=png, **common | {"type": f"{kind}.completed"})
    return "".join(event_text(event.type, event.model_dump()) for event in (partial_image, completed))


def _schemas(request: type[ImagesRequest], operation: Schema, offer: Offer) -> dict[str, Schema]:
    has_form = MULTIPART in operation["requestBody"]["content"]
    models = [name for name, each in offer.models.items() if has_picture_tasks(each) or not has_form]
    schema = _request_schema(request, offer, models or offer.names)
    schemas = {request.__name__: _permitting_null(schema)}
    default = next((offer.models[name] for name in models), None)
    if default and not default.has_digits:
        prompt = {"prompt": default.class_names[0]}
        change_examples(operation, lambda body: {**{n: v for n, v in body.items() if n != "size"}, **prompt})
    if has_form:
        schemas[f"{request.__name__}Form"] = form_schema(schema)
    return schemas


def _request_schema(request: type[ImagesRequest], offer: Offer, models: list[str]) -> Schema:
    """Returns the schema of a request without null, with the limits of the settings and of the models."""
    schema = request.model_json_schema(ref_template=REF)
    fields, sides = schema["properties"], {name: each.image_shape[1] for name, each in offer.models.items()}
    for name in UNSUPPORTED:
        fields.pop(name, None)
    fields["n"]["maximum"] = min(MAX_IMAGES, offer.settings.largest_request)
    sizes = {name: _sizes(side) for name, side in sides.items() if name in models} or {"": _sizes(_SIDE)}
    fields["size"]["enum"] = list(dict.fromkeys(size for each in sizes.values() for size in each))
    fields["model"]["anyOf"] = [{"enum": models}, {"pattern": f"^({'|'.join(OPENAI_MODELS)})"}]
    if len(set(sides.values())) < 2:
        return schema
    default, *others = models
    conditions = [
        {
            "if": {"properties": {"model": {"const": name}}, "required": ["model"]},
            "then": {"properties": {"size": {"enum": sizes[name]}}},
        }
        for name in others
    ]
    named = {"properties": {"model": {"enum": others}}, "required": ["model"]}
    own = {"if": {"not": named}, "then": {"properties": {"size": {"enum": sizes[default]}}}}
    return {**schema, "allOf": [*schema.get("allOf", []), own, *conditions]}


def _sizes(side: int) -> list[str]:
    """Returns the sizes that a request can have for images of this number of pixels per side."""
    return [AUTO, *(size_name(side, scale) for scale in range(1, max_scale_of(side) + 1))]


def _permitting_null(schema: Schema) -> Schema:
    """Returns the schema of a JSON body, in which every optional field can be null."""
    fields = {}
    for name, field in schema["properties"].items():
        if name in schema["required"] or "type" not in field:  # A field without a type permits every value.
            fields[name] = field
            continue
        outside = {key: field[key] for key in ("title", "description", "default") if key in field}
        value = {key: part for key, part in field.items() if key not in outside}
        fields[name] = {**outside, "anyOf": [value, {"type": "null"}]}
    return {**schema, "properties": fields}
