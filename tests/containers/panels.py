"""What the panels of a dashboard ask Prometheus."""

import re
from collections.abc import Iterator
from typing import Any

# What Grafana would put in for its own variables.
OWN = {"$__rate_interval": "1m", "$__interval": "15s", "$__range": "1h"}


def expressions(dashboard: Any) -> list[str]:
    """Those of all panels, with every variable chosen to be anything."""
    return [_as_asked(target["expr"]) for panel in _panels(dashboard) for target in panel.get("targets", [])]


def _panels(dashboard: Any) -> Iterator[Any]:
    for panel in dashboard["panels"]:
        yield panel
        yield from panel.get("panels", [])  # of a row that is folded up


def _as_asked(expression: str) -> str:
    for variable, value in OWN.items():
        expression = expression.replace(variable, value)
    return re.sub(r"\$\{?\w+(:\w+)?\}?", ".*", expression)
