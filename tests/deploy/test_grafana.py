"""Tests the dashboard: valid expressions, existing metrics, layout and descriptions."""

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.promql import TARGET, exposed, grouping_labels, selectors
from tests.deploy.test_prometheus import ALERTS, DASHBOARD, OPERATIONS, ROOT, known_series, promtool, raw_metrics

TEXT = DASHBOARD.read_text()
BOARD = json.loads(TEXT)
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
ROWS = [panel["title"] for panel in BOARD["panels"] if panel["type"] == "row"]
RUNBOOK = OPERATIONS.read_text()
PROVISIONING = ROOT / "deploy" / "grafana" / "provisioning"
EXPRESSIONS = [
    *((panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]),
    *((annotation["name"], annotation["expr"]) for annotation in BOARD["annotations"]["list"]),
]


def datasources(node: Any) -> list[Any]:
    """Returns every data source in the dashboard."""
    if isinstance(node, dict):
        mine = [node["datasource"]] if "datasource" in node else []
        return mine + [found for value in node.values() for found in datasources(value)]
    return [found for value in node for found in datasources(value)] if isinstance(node, list) else []


def family(name: str) -> str:
    return re.sub("_(bucket|sum|count)$", "", name)


def without_variables(expression: str) -> str:
    return expression.replace("$__rate_interval", "1m").replace("$instance", ".*")


def test_there_is_one_dashboard_and_it_is_formatted() -> None:
    assert [path.name for path in DASHBOARD.parent.iterdir()] == ["unfog.json"]
    assert json.dumps(BOARD, indent=2, ensure_ascii=False) + "\n" == TEXT
    assert (BOARD["uid"], BOARD["refresh"], BOARD["schemaVersion"]) == ("unfog", "10s", 39)


def test_panels_have_unique_ids_and_do_not_overlap() -> None:
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"]) > 20
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        assert min(place["x"], place["y"]) >= 0
        assert min(place["w"], place["h"]) > 0
        assert place["x"] + place["w"] <= 24
    for first, second in combinations(BOARD["panels"], 2):
        a, b = first["gridPos"], second["gridPos"]
        apart = [
            a[axis] + a[size] <= b[axis] or b[axis] + b[size] <= a[axis] for axis, size in (("x", "w"), ("y", "h"))
        ]
        assert any(apart), (first["title"], second["title"])


def test_panels_fill_the_rows_without_gaps() -> None:
    bottom = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in BOARD["panels"])
    assert sum(panel["gridPos"]["w"] * panel["gridPos"]["h"] for panel in BOARD["panels"]) == 24 * bottom


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_panels_have_descriptions_units_and_legends(panel: dict[str, Any]) -> None:
    assert len(panel["description"]) > 20
    assert panel["title"]
    assert panel["targets"]
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    if panel["type"] != "table":
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert all(target["legendFormat"] for target in panel["targets"])


def test_panels_use_the_provisioned_data_source() -> None:
    provisioned = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert [(source["uid"], source["type"]) for source in provisioned] == [("prometheus", "prometheus")]
    named = datasources(BOARD)
    assert len(named) > 2 * len(PANELS)
    assert all(source == {"type": "prometheus", "uid": "prometheus"} for source in named)


def test_time_interval_equals_the_scrape_interval() -> None:
    source = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yml").read_text())["datasources"][0]
    scraped = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())["global"]
    assert source["jsonData"]["timeInterval"] == scraped["scrape_interval"]


def test_runbook_lists_the_rows_in_their_order() -> None:
    section = RUNBOOK.split("\n## The dashboard\n")[1].split("\n## ")[0]
    assert re.findall(r"^\d+\. \*\*(.+?)\*\*", section, re.MULTILINE) == ROWS


@pytest.mark.parametrize("text", [RUNBOOK, *(alert["annotations"]["description"] for alert in ALERTS.values())])
def test_rows_and_panels_named_in_the_runbook_and_the_alerts_exist(text: str) -> None:
    named = re.findall(r'\b(row|panel) "([^"]+)"', text)
    titles = {"row": ROWS, "panel": [panel["title"] for panel in PANELS]}
    assert [title for kind, title in named if title not in titles[kind]] == []


def test_variable_selects_instances() -> None:
    (variable,) = BOARD["templating"]["list"]
    assert (variable["name"], variable["query"]["query"]) == ("instance", 'label_values(up{job="unfog"}, instance)')
    assert (variable["includeAll"], variable["allValue"]) == (True, ".*")


@pytest.mark.parametrize(("title", "expression"), EXPRESSIONS)
def test_expressions_use_existing_series_and_labels(title: str, expression: str) -> None:
    known, found = known_series(), selectors(expression)
    assert found
    for series, matchers in found:
        assert series in known, series
        assert set(matchers) <= known[series] | TARGET, (series, matchers)
        is_of_all = series.startswith(("job:", "haproxy_")) or series == "ALERTS"
        assert is_of_all or matchers["instance"] == "$instance", "the expression ignores the variable $instance"
    assert grouping_labels(expression) <= set().union(TARGET, {"le"}, *(known[series] for series, _ in found))


def test_every_metric_of_the_service_is_on_the_dashboard() -> None:
    shown = {family(name) for _, expression in EXPRESSIONS for name in raw_metrics(expression)}
    every = {family(name) for name in exposed() if name.startswith("unfog_")}
    # The series unfog_batch_rows_count also counts steps. An alert uses unfog_alive. If it is 0, unfog_ready is also 0.
    assert every - shown == {"unfog_denoise_steps_total", "unfog_alive"}


def test_promtool_accepts_every_expression(tmp_path: Path) -> None:
    rules = [
        {"record": f"dashboard:panel:{number}", "expr": without_variables(expression)}
        for number, (_, expression) in enumerate(EXPRESSIONS)
    ]
    assert not any("$" in rule["expr"] for rule in rules)
    path = tmp_path / "dashboard.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    checked = promtool("check", "rules", path)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(rules)} rules found" in checked.stdout
