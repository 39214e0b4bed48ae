"""Tests of the page /docs and its files."""

import re
from pathlib import Path

import fastapi_offline
import httpx
import pytest

from tests.app.application import run
from tests.app.fakes import FakeRunner

FILES = {  # path -> media type
    "/docs": "text/html; charset=utf-8",
    "/docs/start.js": "text/javascript; charset=utf-8",
    "/docs/swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "/docs/swagger-ui.css": "text/css; charset=utf-8",
    "/openapi.json": "application/json",
}


def test_page_loads_only_files_of_the_service() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        page = await client.get("/docs")
        named = re.findall(r'(?:src|href)="([^"]*)"', page.text)
        assert "data:," in named  # without an icon, browsers request /favicon.ico
        for address in set(named) - {"data:,"}:
            assert not address.startswith(("http", "//", "/"))  # URLs are relative, because a proxy can add a prefix
            url = page.request.url.join(address)
            assert url.path in FILES
        assert {f"/{address}" for address in named} >= set(FILES) - {"/docs", "/openapi.json"}
        script = (await client.get("/docs/start.js")).text
        assert 'url: "openapi.json"' in script
        for text in (page.text, script):
            assert "//" not in text.replace("<!doctype", "")

    run(check, FakeRunner())


@pytest.mark.parametrize(("path", "media_type"), FILES.items())
def test_docs_need_no_api_key(path: str, media_type: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        answer = await client.get(path)
        assert (answer.status_code, answer.headers["content-type"]) == (200, media_type)
        head = await client.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == answer.headers["content-length"]

    run(check, FakeRunner(), api_keys="a-key")


@pytest.mark.parametrize("name", ["swagger-ui-bundle.js", "swagger-ui.css"])
def test_swagger_ui_files_come_from_the_package(name: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        answer = await client.get(f"/docs/{name}")
        assert answer.content == (Path(fastapi_offline.__file__).parent / "static" / name).read_bytes()
        assert len(answer.content) > 100_000

    run(check, FakeRunner())


@pytest.mark.parametrize("path", [*FILES, "/redoc", "/docs/oauth2-redirect"])
def test_docs_answer_404_if_switched_off(path: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        answer = await client.get(path)
        assert answer.status_code == 404
        assert answer.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"

    run(check, FakeRunner(), docs="off")


@pytest.mark.parametrize("path", ["/redoc", "/docs/", "/docs/redoc.standalone.js", "/docs/../app/main.py"])
def test_other_files_of_the_package_are_not_served(path: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        assert (await client.get(path)).status_code == 404

    run(check, FakeRunner())
