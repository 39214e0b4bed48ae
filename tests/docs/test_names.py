"""Files, variables, routes, modules and extras that a document names exist."""

import json
import re
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from app.settings import Settings, variable_of
from tests.docs.markdown import DOCUMENTS, ROOT, prose

IDS = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
FOLDERS = ("app", "deploy", "docs", "examples", "model", "scripts", "tests")
VARIABLE = re.compile(r"\bUNFOG_[A-Z_]*[A-Z]\b")
# The files that read variables other than the settings: those of compose, of the installation and of the examples.
READERS = (".env.example", "docker-compose.yml", "scripts/setup.sh", "examples/client.py")
VARIABLES = {variable_of(field) for field in Settings.model_fields} | {
    name for file in READERS for name in VARIABLE.findall((ROOT / file).read_text())
}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
ROUTES = {
    f"{method.upper()} {path}"
    for path, methods in json.loads((ROOT / "docs/openapi.json").read_text())["paths"].items()
    for method in methods
}
# Routes that the OpenAPI document does not contain.
PAGES = {"GET /", "GET /openapi.json"}
PAGE_FOLDERS = ("GET /docs", "GET /static/")


@pytest.fixture(params=DOCUMENTS, ids=IDS)
def document(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_paths_of_the_repository_exist(document: Path) -> None:
    named = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*\w)", prose(document))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_variables_are_read_by_the_service_or_a_tool(document: Path) -> None:
    assert set(VARIABLE.findall(document.read_text())) <= VARIABLES


def test_routes_exist(document: Path) -> None:
    named = set(re.findall(r"`(?:HEAD|GET|POST|PUT|DELETE) /[^`\s]*`", prose(document)))
    unknown = {name.strip("`") for name in named} - ROUTES - PAGES
    assert [name for name in unknown if not name.startswith(PAGE_FOLDERS)] == []


def test_modules_that_commands_run_exist(document: Path) -> None:
    named = set(re.findall(r"python -m ([\w.]*\w)", document.read_text()))
    assert [name for name in named if not find_spec(name)] == []


def test_extras_that_commands_install_exist(document: Path) -> None:
    named = {extra for extras in re.findall(r"\.\[([a-z,]+)\]", document.read_text()) for extra in extras.split(",")}
    assert named <= set(EXTRAS)
