"""The OpenAPI document: what FastAPI derives, and the body of /generate, which it does not see."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from app.config import Settings
from app.schemas import GenerateRequest

SUMMARY = "Handwritten digits from a diffusion model. On a CPU the same seed gives the same bytes under any load."

KEYS = {  # asked for where UNFOG_API_KEYS is set
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}


def add_openapi(app: FastAPI, settings: Settings) -> None:
    """Makes the app describe itself completely, with the bounds that its settings set."""

    def describe() -> dict[str, Any]:
        if not app.openapi_schema:
            document = get_openapi(title=app.title, version=app.version, summary=SUMMARY, routes=app.routes)
            schema = GenerateRequest.model_json_schema(ref_template="#/components/schemas/{model}")
            fields = schema["properties"]
            fields["count"]["maximum"] = settings.largest_request
            fields["timeout_seconds"]["maximum"] = settings.request_timeout
            fields["model"] = {**fields["model"], "enum": settings.model_names}
            document["components"]["schemas"]["GenerateRequest"] = schema
            document["components"]["securitySchemes"] = KEYS
            document["paths"]["/generate"]["post"]["security"] = [{}, *({name: []} for name in KEYS)]
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign] # FastAPI's own way of extending the document
