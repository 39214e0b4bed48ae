"""The rules: valid, of metrics that exist, and each alert with a runbook, a case that fires and one that is silent."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.main import create_app
from app.settings import Settings
from tests.app.fakes import FakeRunner
from tests.deploy.promql import OWN, TARGET, exposed, grouping_labels, selectors

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "prometheus"
CASES = sorted((Path(__file__).parent / "prometheus").glob("*.yml"))
OPERATIONS = ROOT / "docs" / "operations.md"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "unfog.json"


def rules_of(name: str) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load((FOLDER / name).read_text())["groups"] for rule in group["rules"]]


RECORDED = {rule["record"]: rule["expr"] for rule in rules_of("recording.yml")}
ALERTS = {rule["alert"]: rule for rule in rules_of("alerts.yml")}
EXPRESSIONS = RECORDED | {name: rule["expr"] for name, rule in ALERTS.items()}
GROUPS = [group for path in CASES for group in yaml.safe_load(path.read_text())["tests"]]


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("needs promtool, of the package prometheus")
    return subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True, check=False)


def known_series() -> dict[str, set[str]]:
    """Every series that an expression may name, with its labels beside the target's."""
    recorded = {name: {"reason"} if "reason" in name.split(":")[0] else set() for name in RECORDED}
    return exposed() | OWN | recorded


def raw_metrics(expression: str) -> set[str]:
    """What it is computed from in the end."""
    names = {name for name, _ in selectors(expression)}
    return {raw for name in names for raw in (raw_metrics(RECORDED[name]) if name in RECORDED else {name})}


def expected(group: dict[str, Any], alert: str, state: str | None) -> bool:
    """Whether the case expects the alert in that state (None: not at all) at some time."""
    cases = [case for case in group["promql_expr_test"] if f'alertname="{alert}"' in case["expr"]]
    if state is None:
        return any(not case["exp_samples"] for case in cases)
    return any(f'alertstate="{state}"' in sample["labels"] for case in cases for sample in case["exp_samples"])


@pytest.mark.parametrize("name", sorted(EXPRESSIONS))
def test_a_rule_names_only_what_exists(name: str) -> None:
    known, found = known_series(), selectors(EXPRESSIONS[name])
    assert found
    for series, matchers in found:
        assert series in known, series
        assert set(matchers) <= known[series] | TARGET | {"le"}, (series, matchers)
    assert grouping_labels(EXPRESSIONS[name]) <= set().union(TARGET, *(known[series] for series, _ in found))


@pytest.mark.parametrize("name", sorted(EXPRESSIONS))
def test_a_rule_compares_with_reasons_and_routes_that_exist(name: str) -> None:
    metrics = create_app(Settings(), FakeRunner).state.service.metrics
    collected = {metric.name: metric for metric in metrics.registry.collect()}
    reasons = {sample.labels["reason"] for sample in collected["unfog_rejected"].samples}
    assert "overloaded" in reasons
    for _, matchers in selectors(EXPRESSIONS[name]):
        assert set(matchers.get("reason", "overloaded").split("|")) <= reasons
        assert matchers.get("route", "/generate") == "/generate"  # the objective is about no other
        assert matchers.get("job", "unfog") == "unfog"


def test_the_configuration_scrapes_the_job_that_the_rules_are_about() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    jobs = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    assert jobs == {"unfog": ["unfog:8000"], "prometheus": ["localhost:9090"]}
    assert set(config["rule_files"]) == {path.name for path in FOLDER.glob("*.yml")} - {"prometheus.yml"}


def test_every_recorded_series_is_used() -> None:
    readers = [rule["expr"] for rule in ALERTS.values()] + list(RECORDED.values()) + [DASHBOARD.read_text()]
    assert [name for name in RECORDED if not any(name in reader for reader in readers)] == []


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_a_recorded_series_is_compared_with_arithmetic(name: str) -> None:
    cases = [case for group in GROUPS for case in group["promql_expr_test"] if name in case["expr"]]
    assert any(sample["value"] for case in cases for sample in case["exp_samples"])


@pytest.mark.parametrize("name", sorted(ALERTS))
def test_an_alert_says_how_bad_it_is_and_what_to_do(name: str) -> None:
    alert = ALERTS[name]
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert set(alert["annotations"]) == {"summary", "description", "runbook"}
    assert all(alert["annotations"].values())
    headings = re.findall(r"^#+ (.+)$", OPERATIONS.read_text(), re.M)
    assert name in headings
    assert alert["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"


def test_the_runbook_has_no_section_of_an_alert_that_is_gone() -> None:
    assert sorted(re.findall(r"^### (Unfog\w+)$", OPERATIONS.read_text(), re.M)) == sorted(ALERTS)


def test_links_within_the_runbook_have_a_section() -> None:
    text = OPERATIONS.read_text()
    anchors = {
        re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", text, re.M)
    }
    links = set(re.findall(r"\]\(#([\w-]+)\)", text))
    assert links
    assert links <= anchors


@pytest.mark.parametrize("name", sorted(ALERTS))
def test_an_alert_has_a_case_that_fires_and_one_that_is_silent(name: str) -> None:
    fires = [group for group in GROUPS if expected(group, name, "firing")]
    silent = [group for group in GROUPS if not expected(group, name, "firing") and expected(group, name, None)]
    assert fires
    # a service without the series that the alert looks at would be silent for nothing
    needed = raw_metrics(ALERTS[name]["expr"])
    given = [{series["series"].split("{")[0] for series in group["input_series"]} for group in silent]
    assert any(needed <= names for names in given)
    # where it must hold for a time, it is nearly there
    assert "for" not in ALERTS[name] or any(expected(group, name, "pending") for group in silent)


def test_promtool_takes_the_configuration_and_its_rules() -> None:
    for arguments in (
        ("check", "config", "--lint=all", "--lint-fatal", FOLDER / "prometheus.yml"),
        ("check", "rules", "--lint=all", "--lint-fatal", FOLDER / "recording.yml", FOLDER / "alerts.yml"),
    ):
        checked = promtool(*arguments)
        assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_the_rules_do_what_their_cases_say(path: Path) -> None:
    tested = promtool("test", "rules", path)
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.slow  # all cases once more, to see that they can fail
def test_the_cases_notice_an_alert_that_does_not_wait(tmp_path: Path) -> None:
    patient = {name for name, alert in ALERTS.items() if "for" in alert}
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    for group in groups:
        group["rules"] = [{key: value for key, value in rule.items() if key != "for"} for rule in group["rules"]]
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump({"groups": groups}))
    for path in CASES:
        cases = yaml.safe_load(path.read_text())
        cases["rule_files"] = [str(FOLDER / "recording.yml"), "alerts.yml"]
        (tmp_path / f"test-{path.name}").write_text(yaml.safe_dump(cases))
    tested = promtool("test", "rules", *sorted(tmp_path.glob("test-*.yml")))
    assert set(re.findall(r'alertname=\\"(\w+)\\"}", time', tested.stdout + tested.stderr)) == patient
