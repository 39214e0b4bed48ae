"""Finds the route of a path before the request is routed."""

from collections.abc import Iterable
from typing import Any

from starlette.routing import BaseRoute, Route


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
