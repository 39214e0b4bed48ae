"""Finds the route of a path, before a request is routed and when it is routed."""

from collections.abc import Iterable
from typing import Any

from starlette.routing import BaseRoute, Match, Route
from starlette.types import Receive, Scope, Send

DOCS_PATH = "/docs"
DOCUMENTS = (DOCS_PATH, "/openapi.json")


class Paths:
    """The paths of some routes, such as `/health` and `/v2/models/{name}`."""

    def __init__(self, *groups: Iterable[BaseRoute], exact: Iterable[str] = ()) -> None:
        """Adds the paths of the routes, and the paths `exact`."""
        routes = [route for group in groups for route in group if isinstance(route, Route)]
        self.templates = frozenset(route.path for route in routes)
        self._with_parameters = [route for route in routes if route.param_convertors]
        self._without_parameters = {route.path for route in routes if not route.param_convertors} | set(exact)

    def template_of(self, path: str) -> str | None:
        """Returns the path of the route that has this path, or None if there is none."""
        if path in self._without_parameters:
            return path
        matching = (route.path for route in self._with_parameters if route.path_regex.match(path))
        return next(matching, None)

    def __contains__(self, path: Any) -> bool:
        return self.template_of(path) is not None


def named_routes(routes: Iterable[BaseRoute]) -> dict[str, str]:
    """Returns the documented paths with their methods, such as `POST /generate`. Includes DOCUMENTS."""
    methods: dict[str, set[str]] = {}
    for route in routes:
        if isinstance(route, Route) and (route.include_in_schema or route.path in DOCUMENTS):
            methods.setdefault(route.path, set()).update((route.methods or set()) - {"HEAD"})
    return {path: f"{', '.join(sorted(of_path))} {path}" for path, of_path in methods.items()}


def methods_of(path: str, routes: Iterable[BaseRoute]) -> set[str]:
    """Returns the methods of all routes that have this path."""
    matching = (route for route in routes if isinstance(route, Route) and route.path_regex.match(path))
    return set[str]().union(*(route.methods or () for route in matching))


class ExactRoutes(BaseRoute):
    """Passes a request to the route that has its path and its method. It is the first route of the application.

    The framework would match the path with the pattern of each route. Routes with parameters still need this.
    """

    def __init__(self, routes: Iterable[BaseRoute]) -> None:
        """If routes have the same path and the same method, the first one is used, as in the framework."""
        self._routes: dict[str, dict[str, Route]] = {}  # path -> method -> route
        for route in routes:
            if isinstance(route, Route) and not route.param_convertors:
                of_path = self._routes.setdefault(route.path, {})
                for method in route.methods or ():
                    of_path.setdefault(method, route)

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Returns the match of a route with this path."""
        route = self._route_of(scope)
        return route.matches(scope) if route else (Match.NONE, {})

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on a request that has matched."""
        route = self._route_of(scope)
        assert route, "only a request that has matched is passed on"
        await route.handle(scope, receive, send)

    def _route_of(self, scope: Scope) -> Route | None:
        """Returns the route with this path and method. If only the path fits, returns the first route with this path.

        The framework then answers with 405.
        """
        of_path = self._routes.get(scope["path"], {})
        return of_path.get(scope.get("method", "")) or next(iter(of_path.values()), None)
