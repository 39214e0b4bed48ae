"""GET / serves the web page, and /static/* serves its files.

The files are read once at the start, so a request cannot read any other file. The URLs in the page are relative, so
that it also works behind a proxy that adds a path prefix.
"""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

from app import errors

router = APIRouter(include_in_schema=False)

FOLDER = Path(__file__).parent / "web"
PAGE_PATH, STATIC_PATH = "/", "/static/{name}"
INDEX = "index.html"
MEDIA_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".png": "image/png",
    ".svg": "image/svg+xml",
}
# Browsers revalidate a cached file with its ETag before each use. A new release is therefore visible at once.
CACHE_CONTROL = "no-cache"


@dataclass(frozen=True, slots=True)
class WebFile:
    """One file of the page."""

    content: bytes
    media_type: str
    etag: str

    @classmethod
    def read(cls, path: Path) -> "WebFile":
        """Reads a file. Its ETag is a digest of the content."""
        content = path.read_bytes()
        return cls(content, MEDIA_TYPES[path.suffix], f'"{sha256(content).hexdigest()[:32]}"')

    def response(self, request: Request) -> Response:
        """Returns the file, or 304 without content if the client has it already."""
        headers = {"ETag": self.etag, "Cache-Control": CACHE_CONTROL}
        known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
        if self.etag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(self.content, media_type=self.media_type, headers=headers)


FILES = {path.name: WebFile.read(path) for path in sorted(FOLDER.iterdir()) if path.suffix in MEDIA_TYPES}
# These paths need no API key.
OPEN_PATHS = frozenset({PAGE_PATH, *(STATIC_PATH.format(name=name) for name in FILES if name != INDEX)})


@router.get(PAGE_PATH)
async def page(request: Request) -> Response:
    """Returns the page."""
    return FILES[INDEX].response(request)


@router.get(STATIC_PATH)
async def static(request: Request, name: str) -> Response:
    """Returns a file of the page. Raises NotFound for any other name."""
    if name not in FILES or name == INDEX:
        raise errors.NotFound
    return FILES[name].response(request)
