"""Finds the series and labels in PromQL expressions. Supports the syntax of our rules and dashboard.

promtool checks the syntax itself.
"""

import re

from prometheus_client.parser import text_string_to_metric_families

from app import errors
from app.main import create_app
from app.metrics import Metrics
from app.settings import Settings
from tests.app.fakes import FakeRunner

STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"((?:[^"\\]|\\.)*)"')
SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\s*(\{[^}]*\})?")
GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
DURATION = re.compile(r"\[[^]]*\]|\boffset\s+\w+")
KEYWORDS = {"and", "or", "unless", "bool"}
TARGET = {"job", "instance"}  # labels that Prometheus adds to every scraped series
# Series of HAProxy with labels that the dashboard may use. tests/e2e/test_replicas.py looks for them on its /metrics.
HAPROXY = {
    "haproxy_backend_connection_errors_total": {"proxy"},
    "haproxy_backend_redispatch_warnings_total": {"proxy"},
    "haproxy_backend_response_errors_total": {"proxy"},
}
OWN = {"up": set(), "ALERTS": {"alertname", "alertstate", "severity", "name"}}  # series of Prometheus itself


def exposed() -> dict[str, set[str]]:
    """Returns every sample name on /metrics with its labels, including those of the process and of a GPU."""
    metrics: Metrics = create_app(Settings(), FakeRunner).state.service.metrics
    for counter, labels in (
        (metrics.requests, ("/generate", "200")),
        (metrics.request_duration, ("/generate",)),
        (metrics.images, ("7", "7")),
        (metrics.model_info, ("default", "0", "cpu", "float32", "0")),
    ):
        counter.labels(*labels)
    metrics.count_rejection(errors.Overloaded(1))
    metrics.watch_device_memory(lambda: 0.0)
    families = text_string_to_metric_families(metrics.render().decode())
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


def selectors(expression: str) -> list[tuple[str, dict[str, str]]]:
    """Returns the name of each selected series and its matchers as {label: value}."""
    bare = DURATION.sub(" ", GROUPING.sub(" ", expression))
    found, end = [], 0
    masked = STRING.sub(lambda string: "\0" * len(string[0]), bare)  # hides names within strings, and keeps the length
    for match in SELECTOR.finditer(masked):
        is_call = masked[match.end() :].lstrip().startswith("(") and not match[2]
        is_number = match.start() > 0 and (masked[match.start() - 1].isalnum() or masked[match.start() - 1] == ".")
        if match.start() < end or is_call or is_number or match[1] in KEYWORDS:
            continue
        end = match.end()
        found.append((match[1], dict(MATCHER.findall(bare[match.start() : match.end()]))))
    return found


def grouping_labels(expression: str) -> set[str]:
    """Returns the labels by which the expression groups or joins."""
    lists = (match[1].split(",") for match in GROUPING.finditer(STRING.sub('""', expression)))
    return {label.strip() for labels in lists for label in labels if label.strip()}
