"""GET /docs shows the OpenAPI document in Swagger UI, with files from the package fastapi-offline instead of a CDN.

The URLs in the page are relative, so that the page also works behind a proxy that adds a path prefix.
"""

from pathlib import Path

import fastapi_offline
from fastapi import APIRouter
from starlette.responses import FileResponse, HTMLResponse, Response

from app.api.http.paths import DOCS_PATH

router = APIRouter(include_in_schema=False)

ASSETS = Path(fastapi_offline.__file__).parent / "static"
PAGE_PATH = DOCS_PATH
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>unfog API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<noscript>This page needs JavaScript. The OpenAPI document is at <a href="openapi.json">openapi.json</a>.</noscript>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
# validatorUrl is null because Swagger UI would otherwise send the document's URL to an online validator.
START = """SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  displayRequestDuration: true,
  validatorUrl: null,
});
"""


@router.get(PAGE_PATH, response_class=HTMLResponse)
async def page() -> HTMLResponse:
    return HTMLResponse(PAGE)


@router.get(f"{PAGE_PATH}/start.js")
async def start() -> Response:
    """Returns the script that starts Swagger UI. It is a file because the page has no inline scripts."""
    return Response(START, media_type="text/javascript")


@router.get(f"{PAGE_PATH}/swagger-ui-bundle.js")
async def bundle() -> FileResponse:
    return _asset("swagger-ui-bundle.js", "text/javascript")


@router.get(f"{PAGE_PATH}/swagger-ui.css")
async def style() -> FileResponse:
    return _asset("swagger-ui.css", "text/css")


def _asset(name: str, media_type: str) -> FileResponse:
    return FileResponse(ASSETS / name, media_type=media_type)
