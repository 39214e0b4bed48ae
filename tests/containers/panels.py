"""Extracts the PromQL expressions of a Grafana dashboard."""

import re
from collections.abc import Iterator
from typing import Any

# Values for Grafana's built-in variables.
OWN = {"$__rate_interval": "1m", "$__interval": "15s", "$__range": "1h"}


def expressions(dashboard: Any) -> list[str]:
    """Returns the expressions of all panels. Other variables are replaced by `.*`."""
    return [_as_asked(target["expr"]) for panel in _panels(dashboard) for target in panel.get("targets", [])]


def _panels(dashboard: Any) -> Iterator[Any]:
    for panel in dashboard["panels"]:
        yield panel
        yield from panel.get("panels", [])  # panels in a collapsed row


def _as_asked(expression: str) -> str:
    for variable, value in OWN.items():
        expression = expression.replace(variable, value)
    return re.sub(r"\$\{?\w+(:\w+)?\}?", ".*", expression)
