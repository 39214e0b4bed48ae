"""What a PromQL expression refers to, as far as rules and a dashboard write it; promtool knows whether it is valid."""

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
TARGET = {"job", "instance"}  # what Prometheus adds to every scraped series
OWN = {"up": set(), "ALERTS": {"alertname", "alertstate", "severity", "name"}}  # Prometheus' own series


def exposed() -> dict[str, set[str]]:
    """Every sample that the service can expose, with its labels; of the process too, and of a GPU."""
    metrics: Metrics = create_app(Settings(), FakeRunner).state.service.metrics
    for counter, labels in (
        (metrics.requests, ("/generate", "200")),
        (metrics.request_duration, ("/generate",)),
        (metrics.images, ("7",)),
        (metrics.model_info, ("default", "0", "cpu", "float32", "0")),
    ):
        counter.labels(*labels)
    metrics.count_rejection(errors.Overloaded(1))
    metrics.watch_device_memory(lambda: 0.0)
    families = text_string_to_metric_families(metrics.render().decode())
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


def selectors(expression: str) -> list[tuple[str, dict[str, str]]]:
    """Each series that it selects: its name, and its matchers' labels with what they are compared with."""
    bare = DURATION.sub(" ", GROUPING.sub(" ", expression))
    found, end = [], 0
    masked = STRING.sub(lambda string: "\0" * len(string[0]), bare)  # of the same length: no name within a string
    for match in SELECTOR.finditer(masked):
        is_call = masked[match.end() :].lstrip().startswith("(") and not match[2]
        is_number = match.start() > 0 and (masked[match.start() - 1].isalnum() or masked[match.start() - 1] == ".")
        if match.start() < end or is_call or is_number or match[1] in KEYWORDS:
            continue
        end = match.end()
        found.append((match[1], dict(MATCHER.findall(bare[match.start() : match.end()]))))
    return found


def grouping_labels(expression: str) -> set[str]:
    """The labels that it groups or joins by."""
    lists = (match[1].split(",") for match in GROUPING.finditer(STRING.sub('""', expression)))
    return {label.strip() for labels in lists for label in labels if label.strip()}
