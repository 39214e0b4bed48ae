"""Builds the OpenAPI document.

FastAPI generates most of it. This module adds the bodies of the POST routes, the values that each served checkpoint
supports, the events of a stream, and examples. groups.py sorts the routes into groups.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from app.api import examples, task_examples
from app.api.batch_events import BatchEvent
from app.api.generation import Service
from app.api.groups import add_groups
from app.api.inference import examples as inference_examples
from app.api.inference.schemas import InferenceRequest
from app.api.openai.document import EDITS_PATH, GENERATIONS_PATH, add_openai
from app.api.openai.schemas import EDIT_EVENTS, GENERATION_EVENTS
from app.api.schemas import AcceptedEvent, DoneEvent, GeneratedImage, GenerateRequest, Problem, ProgressEvent
from app.api.score_schemas import ScoreRequest
from app.api.task_schemas import DenoiseRequest, EditRequest, InpaintRequest, RecognizeRequest, ReproduceRequest
from app.api.uploads import MULTIPART, multipart_schema
from app.engine.job import DEFAULT_MODEL, FAST_MODEL
from app.settings import Settings
from model.checkpoint import CheckpointError, read_config
from model.spec import MOST_STEPS, SAMPLERS, ModelSpec

SUMMARY = "Handwritten digits from a diffusion model. On a CPU the same seed gives the same bytes under any load."

KEYS_REQUIRED = "Required if UNFOG_API_KEYS is set."
KEYS = {
    "bearer": {"type": "http", "scheme": "bearer", "description": KEYS_REQUIRED},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": KEYS_REQUIRED},
}

REF = "#/components/schemas/{model}"
JSON, PROBLEM_JSON, EVENT_STREAM = "application/json", "application/problem+json", "text/event-stream"
EVENTS: dict[str, type[BaseModel]] = {  # event name -> schema of its data
    "accepted": AcceptedEvent,
    "progress": ProgressEvent,
    "image": GeneratedImage,
    "done": DoneEvent,
    "error": Problem,
}
BATCH_PATH = "/events/batch"
MODEL_PATH, INFER_PATH = "/v2/models/{name}", inference_examples.INFER_PATH
BATCH_EVENTS: dict[str, type[BaseModel]] = {"batch": BatchEvent, "error": Problem}
STREAMS: dict[str, tuple[str, dict[str, type[BaseModel]]]] = {  # name of the schema of an event -> order, events
    "StreamEvent": ("of a stream: accepted, then progress and image events, then done or error.", EVENTS),
    "BatchStreamEvent": ("of a stream of batches: batch events, then error.", BATCH_EVENTS),
    "ImageGenerationStreamEvent": ("of a stream of /v1/images/generations.", GENERATION_EVENTS),
    "ImageEditStreamEvent": ("of a stream of /v1/images/edits.", EDIT_EVENTS),
}
STREAM_OF_PATH = {  # path -> name of the schema of an event; all other paths have StreamEvent
    BATCH_PATH: "BatchStreamEvent",
    GENERATIONS_PATH: "ImageGenerationStreamEvent",
    EDITS_PATH: "ImageEditStreamEvent",
}
PICTURE_REQUESTS: dict[str, type[BaseModel]] = {  # path -> schema of its body
    "/recognize": RecognizeRequest,
    "/denoise": DenoiseRequest,
    "/inpaint": InpaintRequest,
    "/edit": EditRequest,
    "/reproduce": ReproduceRequest,
    "/score": ScoreRequest,
}
NUM_CLASSES = 10  # digits that requests permit
PICTURE_SHAPE = (1, 28, 28)  # of the images of a model that supports requests with pictures

Schema = dict[str, Any]


class Document:
    """Builds the OpenAPI document, and builds it again after the checkpoints are loaded."""

    def __init__(self, app: FastAPI, service: Service) -> None:
        self._app, self._service = app, service
        self._built: tuple[dict[str, ModelSpec], dict[str, Any]] | None = None

    def __call__(self) -> dict[str, Any]:
        specs = self._specs()
        if not self._built or self._built[0] != specs:
            self._built = specs, self._build(specs)
        return self._built[1]

    def _specs(self) -> dict[str, ModelSpec]:
        """Returns the specification of each model: from the engine, or from the files before they are loaded."""
        if models := self._service.engine.models:
            return {name: info.spec for name, info in models.items()}
        if self._built:
            return self._built[0]
        settings = self._service.settings
        paths = {DEFAULT_MODEL: settings.checkpoint, FAST_MODEL: settings.fast_path}
        try:
            return {name: read_config(path).spec for name, path in paths.items() if path}
        except CheckpointError:  # The engine reports the error when it loads the file.
            return {}

    def _build(self, specs: Mapping[str, ModelSpec]) -> dict[str, Any]:
        app, settings = self._app, self._service.settings
        document = get_openapi(title=app.title, version=app.version, summary=SUMMARY, routes=app.routes)
        add_groups(document)
        schemas = document["components"]["schemas"]
        schemas["GenerateRequest"] = _request_schema(GenerateRequest, settings, specs)
        with_pictures = {name: each for name, each in specs.items() if _has_pictures(each)}
        for request in PICTURE_REQUESTS.values():
            schema = _request_schema(request, settings, with_pictures)
            schemas[request.__name__], schemas[f"{request.__name__}Form"] = schema, _form_schema(schema)
        schemas |= _event_schemas() | _inference_schemas(settings)
        document["components"]["securitySchemes"] = KEYS
        for path, operations in document["paths"].items():
            for operation in operations.values():
                if "401" in operation["responses"]:
                    operation["security"] = [{}, *({name: []} for name in KEYS)]
                answers = operation["responses"]["200"]["content"]
                if EVENT_STREAM in answers:
                    answers[EVENT_STREAM] = _event_stream(STREAM_OF_PATH.get(path, "StreamEvent"))
        _complete_inference(document, settings, list(specs) or settings.model_names)
        num_classes = {name: each.num_classes for name, each in specs.items()} or {DEFAULT_MODEL: NUM_CLASSES}
        _body_of(document, "/generate")[JSON]["examples"] = examples.requests(settings, num_classes)
        for path in PICTURE_REQUESTS:
            for media_type, body in _body_of(document, path).items():
                body["examples"] = task_examples.requests(path, as_files=media_type == MULTIPART)
        _add_examples(document, settings)
        names = list(specs) or settings.model_names
        models = {GENERATIONS_PATH: names, EDITS_PATH: list(with_pictures) or names}
        # All models have images of the same size.
        side = next((each.image_shape[1] for each in specs.values()), PICTURE_SHAPE[1])
        edited = task_examples.ANSWERS["/edit", "200", JSON]["images"][0]["png"]
        add_openai(document, settings, models, side, _form_schema, edited)
        for unused in ("HTTPValidationError", "ValidationError"):  # of the responses with 422 that FastAPI added
            schemas.pop(unused, None)
        return document


def add_openapi(app: FastAPI, service: Service) -> None:
    """Makes `app.openapi()` return the complete document, with the limits of the settings and checkpoints."""
    app.openapi = Document(app, service)  # type: ignore[method-assign] # FastAPI documents this way of extending it


def _request_schema(request: type[BaseModel], settings: Settings, specs: Mapping[str, ModelSpec]) -> Schema:
    """Returns the schema of a request, with the limits of the settings and of the models that support it."""
    schema = request.model_json_schema(ref_template=REF)
    fields = schema["properties"]
    if "count" in fields:
        fields["count"]["maximum"] = settings.largest_request
    fields["timeout_seconds"]["maximum"] = settings.longest_timeout
    if "model" in fields:
        fields["model"] = {**fields["model"], "enum": list(specs) or settings.model_names}
    conditions = [condition for name, spec in specs.items() if (condition := _condition(name, spec, fields))]
    return {**schema, "allOf": [*schema.get("allOf", []), *conditions]} if conditions else schema


def _has_pictures(spec: ModelSpec) -> bool:
    """Returns True if the model supports requests with pictures."""
    return not spec.steps and spec.image_shape == PICTURE_SHAPE


def _condition(model: str, spec: ModelSpec, names: Collection[str]) -> Schema | None:
    """Returns the schema that requests with the fields `names` must also satisfy for this model, or None."""
    fields: Schema = {}
    if spec.num_classes < NUM_CLASSES:
        fields["digit"] = {"maximum": spec.num_classes - 1}
    if spec.steps:
        fields["num_steps"] = {"enum": sorted(spec.steps)}
    elif spec.max_steps < MOST_STEPS:
        fields["num_steps"] = {"maximum": spec.max_steps}
    if set(spec.samplers) != set(SAMPLERS):
        fields["sampler"] = {"enum": list(spec.samplers)}
    if not spec.guidable:
        fields["guidance_scale"] = {"const": 1}
    fields = {name: values for name, values in fields.items() if name in names}
    if not fields:
        return None
    named: Schema = {"properties": {"model": {"const": model}}}
    if model != DEFAULT_MODEL:  # A request without `model` uses the default model.
        named["required"] = ["model"]
    return {"if": named, "then": {"properties": fields}}


def _form_schema(schema: Schema) -> Schema:
    """Returns the schema of a multipart body, with an empty example for each optional field without a default.

    Without an example, Swagger UI fills in a made-up value, and sends it unless the user removes it.
    """
    form = multipart_schema({**schema, "title": f"{schema['title']}Form"})
    for name, field in form["properties"].items():
        if "default" not in field and name not in form["required"]:
            field["examples"] = [""]
    return form


def _body_of(document: dict[str, Any], path: str) -> dict[str, Any]:
    """Returns the media types of the body of a POST route."""
    content: dict[str, Any] = document["paths"][path]["post"]["requestBody"]["content"]
    return content


def _complete_inference(document: dict[str, Any], settings: Settings, models: list[str]) -> None:
    """Adds the names of the models, and examples of requests and errors, to the Open Inference Protocol."""
    for path, operations in document["paths"].items():
        if path.startswith(MODEL_PATH):
            for operation in operations.values():
                operation["parameters"][0]["schema"]["enum"] = models
                operation["responses"].pop("422", None)  # FastAPI adds it. The errors of this protocol have 400.
                errors_of_route = inference_examples.errors_of(settings)
                examples.add_protocol_errors(path, operation["responses"], errors_of_route)
    _body_of(document, INFER_PATH)[JSON]["examples"] = inference_examples.REQUESTS


def _inference_schemas(settings: Settings) -> dict[str, Schema]:
    """Returns the schema of an inference request and of its parts, with the limits of the settings."""
    _, definitions = models_json_schema([(InferenceRequest, "validation")], ref_template=REF)
    schemas: dict[str, Schema] = definitions["$defs"]
    tensor, timeout = schemas["InputTensor"]["properties"], schemas["InferenceParameters"]["properties"]
    tensor["shape"]["items"]["maximum"] = tensor["data"]["maxItems"] = settings.largest_request
    timeout["timeout_seconds"]["maximum"] = settings.longest_timeout
    return schemas


def _event_schemas() -> dict[str, Schema]:
    """Returns the schema of each event's data, and of one event of each kind of stream, as in OpenAPI 3.2."""
    every_model = {model: None for _, events in STREAMS.values() for model in events.values()}
    models = [(model, "serialization") for model in every_model]
    _, definitions = models_json_schema(models, ref_template=REF)  # type: ignore[arg-type] # a list of pairs
    schemas: dict[str, Schema] = definitions["$defs"]
    for title, (order, events) in STREAMS.items():
        schemas[title] = _stream_schema(title, f"One event {order}", events)
    return schemas


def _stream_schema(title: str, description: str, events: Mapping[str, type[BaseModel]]) -> Schema:
    kinds = [_event_schema(name, model.__name__) for name, model in events.items()]
    return {"title": title, "description": description, "oneOf": kinds}


def _event_schema(name: str, model: str) -> Schema:
    data = {
        "type": "string",
        "contentMediaType": JSON,
        "contentSchema": {"$ref": REF.format(model=model)},
    }
    return {
        "title": name,
        "type": "object",
        "properties": {"event": {"const": name}, "data": data},
        "required": ["event", "data"],
    }


def _event_stream(item: str) -> Schema:
    """Returns the media type object of an event stream. `item` is the schema of one event.

    OpenAPI 3.1 can describe a stream only as text. `x-itemSchema` has the meaning of `itemSchema` in OpenAPI 3.2.
    """
    description = f"Server-sent events, each with a line `event: name` and a line `data: JSON` (schema {item})."
    return {
        "schema": {"type": "string", "description": description},
        "x-itemSchema": {"$ref": REF.format(model=item)},
    }


def _add_examples(document: dict[str, Any], settings: Settings) -> None:
    """Adds an example for every text response, and example problem documents for each error status."""
    answers = {**examples.ANSWERS, **task_examples.ANSWERS, **inference_examples.ANSWERS}
    for path, operations in document["paths"].items():
        formats = list(next(iter(operations.values()))["responses"]["200"]["content"])
        problems = examples.problems(settings, formats, pictures=_pictures_of(path))
        for status, response in _responses(operations):
            content = response.get("content", {})
            if PROBLEM_JSON in content:
                content.pop(JSON, None)  # FastAPI adds the media type of successful responses
                content[PROBLEM_JSON]["examples"] = {
                    problem["code"]: {"value": problem}
                    for problem in problems
                    # The description of a response has the codes of its errors.
                    if problem["status"] == int(status) and problem["code"] in response["description"]
                }
            for media_type, described in content.items():
                if (path, status, media_type) in answers:
                    described["example"] = answers[path, status, media_type]


def _pictures_of(path: str) -> str | None:
    """Returns the name of the field with the pictures of a route, or None."""
    if path not in PICTURE_REQUESTS:
        return None
    return "images" if "images" in PICTURE_REQUESTS[path].model_fields else "image"


def _responses(operations: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for operation in operations.values():
        yield from operation["responses"].items()
