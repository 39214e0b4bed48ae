"""Adds the OpenAI Images API to the OpenAPI document: the schemas of requests, the responses and the examples."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from app import errors
from app.api.events import event_text
from app.api.examples import FILE, PNG, PREVIEW, add_protocol_errors, general_errors
from app.api.openai.options import OPENAI_MODELS, size_name
from app.api.openai.prompt import HOW, description_of
from app.api.openai.schemas import (
    AUTO,
    EDIT,
    GENERATION,
    MAX_IMAGES,
    UNSUPPORTED,
    CompletedImage,
    CreatedImages,
    ImageData,
    ImageEditRequest,
    ImageGenerationRequest,
    ImagesRequest,
    OpenAIError,
    OpenAIModel,
    OpenAIModels,
    PartialImage,
)
from app.api.picture_files import damaged
from app.api.responses import ERRORS, EVENTS, JSON
from app.api.uploads import MULTIPART
from app.settings import Settings
from model.png import MAX_SCALE

GENERATIONS_PATH, EDITS_PATH = "/v1/images/generations", "/v1/images/edits"
MODELS_PATH, MODEL_PATH = "/v1/models", "/v1/models/{model}"
REQUESTS: dict[str, type[ImagesRequest]] = {GENERATIONS_PATH: ImageGenerationRequest, EDITS_PATH: ImageEditRequest}
REF = "#/components/schemas/{model}"

Schema = dict[str, Any]


def _described(statuses: Sequence[int], **others: str) -> dict[int | str, Schema]:
    """Returns the error responses with these statuses. `others` has further descriptions, such as status_400="..."."""
    texts = {status: ERRORS[status]["description"] for status in statuses}
    texts |= {int(status.removeprefix("status_")): text for status, text in others.items()}
    return {status: {"model": OpenAIError, "description": text} for status, text in sorted(texts.items())}


_INVALID = "invalid_request: `param` names a field that is missing, unknown, invalid or not permitted by the model"
_WORK_ERRORS = (401, 403, 408, 413, 429, 500, 503, 504)
_GENERATION_ERRORS = _described(_WORK_ERRORS, status_400=f"malformed_json, malformed_request. {_INVALID}")
_EDIT_ERRORS = _described(
    _WORK_ERRORS,
    status_400="malformed_json, malformed_request. invalid_image: `param` names a picture that cannot be decoded. "
    f"{_INVALID}",
    status_413="body_too_large: the body exceeds UNFOG_MAX_IMAGE_BYTES",
)
_RATE_LIMITED = "rate_limited: the rate limit is exceeded, with Retry-After"
MODELS_RESPONSES = _described((401, 403, 500, 503), status_429=_RATE_LIMITED)
MODEL_RESPONSES = _described(
    (401, 403, 500, 503), status_404="not_found: the model is not served", status_429=_RATE_LIMITED
)


def _route(request: type[ImagesRequest], refused: dict[int | str, Schema], *, has_form: bool) -> dict[str, Any]:
    """Returns the arguments of a POST route."""
    content = {JSON: {"schema": {"$ref": REF.format(model=request.__name__)}}}
    if has_form:
        content[MULTIPART] = {"schema": {"$ref": REF.format(model=f"{request.__name__}Form")}}
    refused = {**refused, 431: ERRORS[431]}  # The HTTP server sends this error without the routes.
    created = {
        "model": CreatedImages,
        "description": "the images, or a stream of events if `stream` is true",
        "content": {EVENTS: {"schema": {"type": "string"}}},
    }
    return {
        "responses": {200: created, **refused},
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
    }


GENERATIONS = _route(ImageGenerationRequest, _GENERATION_ERRORS, has_form=False)
EDITS = _route(ImageEditRequest, _EDIT_ERRORS, has_form=True)


def add_openai(
    document: dict[str, Any],
    settings: Settings,
    models: Mapping[str, Sequence[str]],
    side: int,
    form_of: Callable[[Schema], Schema],
    edited: str,
) -> None:
    """Adds the schemas of the requests, and the examples.

    `models` maps the path of each POST route to the models that it permits. Their images have `side` x `side` pixels.
    `form_of` returns the schema of a multipart body. `edited` is the picture of the example of an edit.
    """
    schemas, paths, answers = document["components"]["schemas"], document["paths"], _answers(edited)
    for path, request in REQUESTS.items():
        schema = _request_schema(request, settings, models[path], side)
        schemas[request.__name__] = _permitting_null(schema)
        for media_type, body in paths[path]["post"]["requestBody"]["content"].items():
            if media_type == MULTIPART:
                schemas[f"{request.__name__}Form"] = form_of(schema)
            body["examples"] = _request_examples(path, as_files=media_type == MULTIPART)
    for path in (*REQUESTS, MODELS_PATH, MODEL_PATH):
        for operation in paths[path].values():
            operation["responses"].pop("422", None)  # FastAPI adds it. The errors of this API have the status 400.
            for media_type, content in operation["responses"]["200"]["content"].items():
                content["example"] = answers[path, media_type]
            add_protocol_errors(path, operation["responses"], _errors(path, settings))


def _request_schema(request: type[ImagesRequest], settings: Settings, models: Sequence[str], side: int) -> Schema:
    """Returns the schema of a request without null, with the limits of the settings and of the models."""
    schema = request.model_json_schema(ref_template=REF)
    fields = schema["properties"]
    for name in UNSUPPORTED:
        fields.pop(name, None)
    fields["n"]["maximum"] = min(MAX_IMAGES, settings.largest_request)
    fields["size"]["enum"] = [AUTO, *(size_name(side, scale) for scale in range(1, MAX_SCALE + 1))]
    fields["model"]["anyOf"] = [{"enum": list(models)}, {"pattern": f"^({'|'.join(OPENAI_MODELS)})"}]
    return schema


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


# The lower half of this mask is transparent.
_MASK = (
    "iVBORw0KGgoAAAANSUhEUgAAABwAAAAcCAQAAADYBBcfAAAAH0lEQVR4nGNk"
    "+M9AFmAiT9uoxlGNQ0fjKBgFowAXAAC6KgEbKV+qMQAAAABJRU5ErkJggg=="
)
_EXAMPLES: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {  # path -> name -> summary and JSON body
    GENERATIONS_PATH: {
        "one": ("One digit", {"prompt": "a handwritten seven, please"}),
        "seed": ("A digit with a fixed seed", {"prompt": "7", "size": "28x28", "seed": 42}),
        "several": ("Several digits with fewer steps", {"prompt": "seven", "n": 4, "quality": "medium"}),
    },
    EDITS_PATH: {
        "edit": (
            "A 7 becomes a similar 9",
            {"image": PREVIEW, "prompt": "Make it a nine", "size": "28x28", "seed": 42},
        ),
        "mask": (
            "The transparent half is filled in",
            {"image": PREVIEW, "mask": _MASK, "prompt": "a nine", "seed": 42},
        ),
    },
}
_CREATED_AT = 1_790_000_000
_SEED = 42
_FACTS: dict[str, Any] = {"quality": "high", "size": "28x28", "seed": _SEED}


def _request_examples(path: str, *, as_files: bool) -> dict[str, Schema]:
    pictures = {"image", "mask"}
    return {
        name: {
            "summary": summary,
            "value": {**body, **dict.fromkeys(pictures & set(body), FILE)} if as_files else body,
        }
        for name, (summary, body) in _EXAMPLES[path].items()
    }


def _created(digit: int, png: str) -> dict[str, Any]:
    data = [ImageData(b64_json=png, revised_prompt=description_of(digit))]
    return CreatedImages(created=_CREATED_AT, data=data, model="default", **_FACTS).model_dump()


def _stream(kind: str, preview: str, png: str) -> str:
    common: dict[str, Any] = {"created_at": _CREATED_AT, "index": 0, **_FACTS}
    partial = PartialImage(b64_json=preview, partial_image_index=0, **common | {"type": f"{kind}.partial_image"})
    completed = CompletedImage(b64_json=png, **common | {"type": f"{kind}.completed"})
    return "".join(event_text(event.type, event.model_dump()) for event in (partial, completed))


_MODEL = OpenAIModel(id="default", created=_CREATED_AT)


def _answers(edited: str) -> dict[tuple[str, str], Any]:
    """Returns the examples of responses by path and media type."""
    return {
        (GENERATIONS_PATH, JSON): _created(7, PNG),
        (GENERATIONS_PATH, EVENTS): _stream(GENERATION, PREVIEW, PNG),
        (EDITS_PATH, JSON): _created(9, edited),
        (EDITS_PATH, EVENTS): _stream(EDIT, PREVIEW, edited),
        (MODELS_PATH, JSON): OpenAIModels(data=[_MODEL]).model_dump(),
        (MODEL_PATH, JSON): _MODEL.model_dump(),
    }


def _errors(path: str, settings: Settings) -> list[errors.UnfogError]:
    return [
        *general_errors(settings, settings.max_image_bytes if path == EDITS_PATH else settings.max_body_bytes),
        errors.InvalidRequest.of("prompt", f"The prompt names no digit. {HOW}"),
        errors.InvalidImage.of("image", str(damaged("PNG"))),
        errors.NotFound("This model is not served. Use 'default'"),
    ]
