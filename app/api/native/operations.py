"""What the operations of this API have in common: their errors, and the limits of their requests."""

from collections.abc import Collection, Mapping
from functools import partial

from pydantic import BaseModel

from app.api.http.media_types import ANIMATIONS, EVENTS, JSON, MULTIPART, PNG, ZIP
from app.api.native.events import AcceptedEvent, DoneEvent, ProgressEvent
from app.api.native.schemas import GeneratedImage
from app.api.operations import (
    BINARY,
    IMAGE_TOO_LARGE,
    REF,
    STATUS,
    Offer,
    Operation,
    Problem,
    Schema,
    Stream,
    body_of,
    change_examples,
    default_of,
    form_schema,
)
from app.errors import BodyTooLarge, InvalidImage, InvalidRequest, NotAcceptable, UnsupportedMediaType
from app.tasks.from_image import has_picture_tasks
from app.tasks.labels import MAX_DIGIT
from app.tasks.picture_files import damaged
from app.tasks.sampling import max_scale_of
from model.png import MAX_SCALE
from model.spec import MOST_STEPS, PIPELINE_SAMPLERS, ModelSpec

ONE_CLASS: Schema = {"not": {"required": ["label", "digit"]}}
WORK_STATUSES = {status: text for status, text in STATUS.items() if status != 501}
CLIP_STATUSES = {501: STATUS[501]}
PICTURE_STATUSES = {
    **WORK_STATUSES,
    413: IMAGE_TOO_LARGE,
    415: "unsupported_media_type: Content-Type is neither JSON nor multipart/form-data",
    422: "invalid_request: a field is missing, unknown or invalid. invalid_image: a picture cannot be "
    "decoded, is animated, or is larger than 4,096 x 4,096 pixels",
}
STREAM = Stream(
    "StreamEvent",
    "of a stream: accepted, then progress and image events, then done or error.",
    {
        "accepted": AcceptedEvent,
        "progress": ProgressEvent,
        "image": GeneratedImage,
        "done": DoneEvent,
        "error": Problem,
    },
)


def images_formats(stream: str) -> dict[str, Schema]:
    """Returns the formats of generated images besides JSON. `stream` is the example of a stream."""
    return {PNG: BINARY, ZIP: BINARY, EVENTS: STREAM.content(stream), **dict.fromkeys(ANIMATIONS, BINARY)}


def picture_operation(  # noqa: PLR0913 # most are optional
    name: str,
    summary: str,
    request: type[BaseModel],
    answer: type[BaseModel],
    *,
    examples: Mapping[str, tuple[str, Schema]],
    example: Schema,
    stream: str | None = None,
    formats: Mapping[str, Schema] | None = None,
    statuses: Mapping[int, str] = PICTURE_STATUSES,
    pictures: Collection[str] = ("image",),
) -> Operation:
    """Returns the operation of a task with pictures. `stream` is the example of a stream, if it generates images.

    `pictures` are the fields with pictures, and `example` is the answer in JSON.
    """
    formats = formats or {}
    if stream:
        formats = images_formats(stream)
    field = next(iter(pictures))
    index = [0] if "images" in pictures else []
    return Operation(
        path=f"/{name}",
        name=name,
        group="Pictures",
        summary=summary,
        method="POST",
        answer=answer,
        example=example,
        description="the result, in the format that Accept selects",
        formats=formats,
        stream=STREAM if stream else None,
        body=body_of(request, examples, pictures),
        statuses=statuses,
        errors=[
            BodyTooLarge(default_of("max_image_bytes")),
            NotAcceptable((JSON, *formats)),
            UnsupportedMediaType(f"Content-Type must be {JSON} or {MULTIPART}"),
            InvalidRequest.of(field, "Field required"),
            InvalidImage.of(field, str(damaged("PNG")), *index),
        ],
        complete=partial(_picture_schemas, request),
    )


def _picture_schemas(request: type[BaseModel], operation: Schema, offer: Offer) -> dict[str, Schema]:
    models = {name: each for name, each in offer.models.items() if has_picture_tasks(each)}
    schema = request_schema(request, Offer(offer.settings, models or offer.models))
    if models and next(iter(models)) != offer.names[0] and "model" in schema["properties"]:
        schema["required"] = [*schema.get("required", ()), "model"]  # The default model supports only /generate.
    for spec in list(models.values())[:1]:
        change_examples(operation, partial(_with_class, spec, is_required="noise_std" in schema["properties"]))
    return {request.__name__: schema, f"{request.__name__}Form": form_schema(schema)}


def _with_class(spec: ModelSpec, body: Schema, *, is_required: bool) -> Schema:
    """Returns the body of an example for a model. `is_required` is True if a model without guidance needs a class."""
    needs_class = "digit" in body or (is_required and not spec.guidable)
    if spec.has_digits:
        return {"digit": 7, **body} if needs_class and spec.num_classes > MAX_DIGIT else body
    others = {name: value for name, value in body.items() if name != "digit"}
    return {**others, "label": spec.class_names[0]} if needs_class else others


def request_schema(request: type[BaseModel], offer: Offer) -> Schema:
    """Returns the schema of a request, with the limits of the settings and of the models."""
    schema = request.model_json_schema(ref_template=REF)
    fields = schema["properties"]
    if "count" in fields:
        fields["count"]["maximum"] = offer.settings.largest_request
    fields["timeout_seconds"]["maximum"] = offer.settings.longest_timeout
    if "labels" in fields:
        fields["labels"]["maxItems"] = offer.settings.largest_request
    if "model" in fields:
        fields["model"] = {**fields["model"], "enum": offer.names}
    found = [_condition(name, each, fields, offer.names[0]) for name, each in offer.models.items()]
    conditions = [condition for condition in found if condition]
    if "label" in fields:
        conditions.insert(0, ONE_CLASS)
    return {**schema, "allOf": [*schema.get("allOf", []), *conditions]} if conditions else schema


def _condition(model: str, spec: ModelSpec, names: Collection[str], default: str) -> Schema | None:
    """Returns the schema that requests with the fields `names` must also satisfy for a model, or None.

    `default` is the name of the default model.
    """
    fields = {**_class_fields(spec), **_image_fields(spec)}
    if spec.steps:
        fields["num_steps"] = {"enum": sorted(spec.steps)}
    elif spec.max_steps < MOST_STEPS:
        fields["num_steps"] = {"maximum": spec.max_steps}
    if set(spec.samplers) != set(PIPELINE_SAMPLERS):
        fields["sampler"] = {"enum": list(spec.samplers)}
    if not spec.guidable:
        fields["guidance_scale"] = {"const": 1}
    fields = {name: values for name, values in fields.items() if name in names}
    then: Schema = {"properties": fields} if fields else {}
    if "noise_std" in names and not spec.guidable:  # The network was trained without a null label.
        then["anyOf"] = [{"required": ["label"]}, {"required": ["digit"]}]
    if not then:
        return None
    named: Schema = {"properties": {"model": {"const": model}}}
    if model != default:  # A request without `model` uses the default model.
        named["required"] = ["model"]
    return {"if": named, "then": then}


def _class_fields(spec: ModelSpec) -> Schema:
    """Returns the schemas of the fields that name a class of a model."""
    largest = spec.num_classes - 1
    label = {"anyOf": [{"enum": list(spec.class_names)}, {"type": "integer", "maximum": largest}]}
    classes: Schema = {"label": label, "labels": {"items": label}}
    if not spec.has_digits:
        return {**classes, "digit": {"not": {}}}
    return {**classes, **({"digit": {"maximum": largest}} if largest < MAX_DIGIT else {})}


def _image_fields(spec: ModelSpec) -> Schema:
    """Returns the schemas of the fields whose values follow from the images of a model."""
    most = max_scale_of(max(spec.image_shape[1:]))
    scale = {"scale": {"maximum": most}} if most < MAX_SCALE else {}
    return {**scale, **({} if spec.normalises_drawings else {"fit": {"enum": ["auto", "resize"]}})}
