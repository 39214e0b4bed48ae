"""Tests of GET / and /static/*: types, ETag, content security policy, API keys, and paths outside the folder."""

import re

import httpx
import pytest

from app.api.page import FILES, FOLDER, INDEX
from tests.app.application import run
from tests.app.fakes import FakeRunner

MEDIA_TYPES = {
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "png": "image/png",
    "svg": "image/svg+xml",
}
MAX_CODE_BYTES = 196_000


def addresses_in(text: str) -> set[str]:
    """Returns the files that HTML or an ES module names, relative to the page."""
    return set(re.findall(r'"static/([^"]+)"', text)) | set(re.findall(r'from "\./([^"]+)"', text))


def test_page_is_html_and_names_only_relative_files_that_exist() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        page = await client.get("/")
        assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert not re.search(r'(?:src|href)="(?:https?:|/)', page.text)  # a proxy can add a prefix
        named = addresses_in(page.text)
        waiting = set(named)
        while waiting:
            answer = await client.get(f"/static/{waiting.pop()}")
            assert answer.status_code == 200, answer.url
            if answer.headers["content-type"].startswith("text/javascript"):
                new = addresses_in(answer.text) - named
                named, waiting = named | new, waiting | new
        assert named == {path.name for path in FOLDER.iterdir()} - {INDEX}  # no file is unused

    run(check, FakeRunner())


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_content_security_policy_forbids_other_hosts_and_inline_scripts(path: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        page = await client.get(path)
        policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
        assert policy == {
            "default-src": "'none'",
            "script-src": "'self'",
            "style-src": "'self'",
            "img-src": "'self' data: blob:",
            "connect-src": "'self'",
            "base-uri": "'none'",
            "form-action": "'none'",
            "frame-ancestors": "'none'",
        }
        assert not re.findall(r"<script(?![^>]*\bsrc=)|<style|\bon\w+=|\bstyle=", page.text)

    run(check, FakeRunner())


@pytest.mark.parametrize("path", ["/", *(f"/static/{name}" for name in FILES if name != INDEX)])
def test_file_needs_no_api_key_and_is_sent_once_for_an_etag(path: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        first = await client.get(path)
        assert first.status_code == 200
        assert first.headers["cache-control"] == "no-cache"
        if path != "/":
            assert first.headers["content-type"] == MEDIA_TYPES[path.rpartition(".")[2]]
        assert first.content == (FOLDER / (path.rpartition("/")[2] or INDEX)).read_bytes()
        tag = first.headers["etag"]
        for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
            again = await client.get(path, headers={"If-None-Match": known})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        changed = await client.get(path, headers={"If-None-Match": '"other"'})
        assert (changed.status_code, changed.content) == (200, first.content)
        head = await client.head(path)
        assert (head.status_code, head.content, head.headers["content-length"]) == (
            200,
            b"",
            first.headers["content-length"],
        )

    run(check, FakeRunner(), api_keys="a-key-for-this-test")


@pytest.mark.parametrize(
    "path",
    [
        "/static/",
        "/static/index.html",
        "/static/page.py",
        "/static/../page.py",
        "/static/..%2f..%2fsettings.py",
        "/static/%2e%2e/page.py",
        "/static//etc/passwd",
        "/static/%2fetc%2fpasswd",
        "/static/main.js%00.png",
        "/static/main.js/",
        "/static/MAIN.JS",
        "/web/main.js",
    ],
)
def test_nothing_outside_of_the_files_of_the_page_can_be_read(path: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        answer = await client.get(httpx.URL(f"http://test{path}"))
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")

    run(check, FakeRunner())


def test_page_off_removes_its_routes() -> None:
    async def check(client: httpx.AsyncClient) -> None:
        for path in ("/", "/static/main.js"):
            assert (await client.get(path)).json()["code"] == "not_found"

    run(check, FakeRunner(), page="off")


def test_code_of_the_page_is_small() -> None:
    code = sum(len(file.content) for name, file in FILES.items() if name.endswith((".js", ".css", ".html")))
    assert code <= MAX_CODE_BYTES
