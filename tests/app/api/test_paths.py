import pytest
from fastapi import APIRouter

from app.api.paths import Paths

router, other = APIRouter(), APIRouter()
for path in ("/health", "/v2", "/v2/models/{name}", "/v2/models/{name}/ready", "/static/{name}"):
    router.add_api_route(path, lambda: None)
other.add_api_route("/generate", lambda: None, methods=["POST"])


@pytest.mark.parametrize(
    ("path", "template"),
    [
        ("/health", "/health"),
        ("/generate", "/generate"),
        ("/icon.svg", "/icon.svg"),
        ("/v2", "/v2"),
        ("/v2/models/default", "/v2/models/{name}"),
        ("/v2/models/{name}", "/v2/models/{name}"),
        ("/v2/models/a b\n", "/v2/models/{name}"),
        ("/v2/models/default/ready", "/v2/models/{name}/ready"),
        ("/static/main.js", "/static/{name}"),
    ],
)
def test_path_has_the_template_of_its_route(path: str, template: str) -> None:
    paths = Paths(router.routes, other.routes, exact=["/icon.svg"])
    assert paths.template_of(path) == template
    assert path in paths


@pytest.mark.parametrize(
    "path",
    [
        *("", "/", "/health/", "/Health", "/healthz", "health", "/v2/", "/v2/models", "/v2/models/"),
        *("/v2/models/a/b", "/v2/models//ready", "/v2/models/default/ready/", "/static/a/b", "/icon.svg/"),
    ],
)
def test_path_without_a_route_has_no_template(path: str) -> None:
    paths = Paths(router.routes, other.routes, exact=["/icon.svg"])
    assert paths.template_of(path) is None
    assert path not in paths


def test_templates_are_the_paths_of_the_routes() -> None:
    assert Paths(router.routes, exact=["/icon.svg"]).templates == {route.path for route in router.routes}  # type: ignore[attr-defined]


def test_paths_without_routes_contain_nothing() -> None:
    assert "/" not in Paths()
    assert Paths().templates == frozenset()
