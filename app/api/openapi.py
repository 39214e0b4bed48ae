"""Builds the OpenAPI document from the declarations of the operations, the settings and the served models."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from app.api.operations import GROUPS, REF, Offer, Operation
from app.api.service import Service
from model.checkpoint import CheckpointError, read_config
from model.spec import ModelSpec

SUMMARY = "Images of a class from a diffusion model. On a CPU the same seed gives the same bytes under any load."
KEYS_REQUIRED = "Required if UNFOG_API_KEYS is set."
KEYS = {
    "bearer": {"type": "http", "scheme": "bearer", "description": KEYS_REQUIRED},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": KEYS_REQUIRED},
}


class Document:
    """Builds the OpenAPI document, and builds it again after the checkpoints are loaded."""

    def __init__(self, app: FastAPI, service: Service, operations: Sequence[Operation]) -> None:
        self._app, self._service = app, service
        self._operations = sorted(operations, key=lambda each: list(GROUPS).index(each.group))
        self._built: tuple[dict[str, ModelSpec], dict[str, Any]] | None = None

    def __call__(self) -> dict[str, Any]:
        specs = self._specs()
        if not self._built or self._built[0] != specs:
            self._built = specs, self._build(specs)
        return self._built[1]

    def _specs(self) -> dict[str, ModelSpec]:
        """Returns the description of each model: from the engine, or from the files before they are loaded."""
        if models := self._service.engine.models:
            return {name: info.spec for name, info in models.items()}
        if self._built:
            return self._built[0]
        paths = self._service.settings.model_paths
        try:
            return {name: read_config(path).spec for name, path in paths.items()}
        except CheckpointError:  # The engine reports the error when it loads the file.
            return {}

    def _build(self, specs: Mapping[str, ModelSpec]) -> dict[str, Any]:
        app, offer = self._app, Offer(self._service.settings, specs)
        tags = [{"name": name, "description": text} for name, text in GROUPS.items()]
        document = get_openapi(title=app.title, version=app.version, summary=SUMMARY, routes=app.routes, tags=tags)
        paths, components = document["paths"], document["components"]
        document["paths"] = {operation.path: paths[operation.path] for operation in self._operations}
        components["securitySchemes"] = KEYS
        schemas = components["schemas"]
        for unused in ("HTTPValidationError", "ValidationError"):  # of the responses with 422 that FastAPI added
            schemas.pop(unused, None)
        models = dict.fromkeys((model, "serialization") for each in self._operations for model in each.models)
        _, definitions = models_json_schema(list(models), ref_template=REF)  # type: ignore[arg-type] # pairs
        schemas |= definitions["$defs"]
        for operation in self._operations:
            described = paths[operation.path][operation.method.lower()]
            schemas |= operation.complete(described, offer)
            if operation.stream:
                schemas |= operation.stream.schemas
            for status, response in operation.arguments["responses"].items():
                for media_type, content in response["content"].items():  # FastAPI removed every null from the examples.
                    examples = {name: content[name] for name in ("example", "examples") if name in content}
                    described["responses"][str(status)]["content"][media_type] |= examples
            if 401 in operation.statuses:
                described["security"] = [{}, *({name: []} for name in KEYS)]
            if 422 not in operation.statuses:
                described["responses"].pop("422", None)  # FastAPI added it.
        return document


def add_openapi(app: FastAPI, service: Service, operations: Sequence[Operation]) -> None:
    """Makes `app.openapi()` return the document."""
    document = Document(app, service, operations)
    app.openapi = document  # type: ignore[method-assign] # FastAPI documents this way of extending it
