"""Tests the rules: existing metrics, a runbook section per alert, and cases that fire and that do not fire."""

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
from tests.deploy.promql import HAPROXY, OWN, TARGET, exposed, grouping_labels, selectors

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
        pytest.skip("needs promtool (Debian package promtool or prometheus)")
    return subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True, check=False)


def known_series() -> dict[str, set[str]]:
    """Returns every series that an expression may use, with its labels other than `job` and `instance`."""
    recorded = {name: {"reason"} if "reason" in name.split(":")[0] else set() for name in RECORDED}
    return exposed() | OWN | HAPROXY | recorded


def raw_metrics(expression: str) -> set[str]:
    """Returns the metrics that an expression uses, directly or through recorded series."""
    names = {name for name, _ in selectors(expression)}
    return {raw for name in names for raw in (raw_metrics(RECORDED[name]) if name in RECORDED else {name})}


def expected(group: dict[str, Any], alert: str, state: str | None) -> bool:
    """True if the case expects the alert in that state at some time. None means that it is not active."""
    cases = [case for case in group["promql_expr_test"] if f'alertname="{alert}"' in case["expr"]]
    if state is None:
        return any(not case["exp_samples"] for case in cases)
    return any(f'alertstate="{state}"' in sample["labels"] for case in cases for sample in case["exp_samples"])


@pytest.mark.parametrize("name", sorted(EXPRESSIONS))
def test_rules_use_existing_series_and_labels(name: str) -> None:
    known, found = known_series(), selectors(EXPRESSIONS[name])
    assert found
    for series, matchers in found:
        assert series in known, series
        assert set(matchers) <= known[series] | TARGET | {"le"}, (series, matchers)
    assert grouping_labels(EXPRESSIONS[name]) <= set().union(TARGET, *(known[series] for series, _ in found))


@pytest.mark.parametrize("name", sorted(EXPRESSIONS))
def test_rules_use_existing_reasons_and_routes(name: str) -> None:
    metrics = create_app(Settings(), FakeRunner).state.service.metrics
    collected = {metric.name: metric for metric in metrics.registry.collect()}
    reasons = {sample.labels["reason"] for sample in collected["unfog_rejected"].samples}
    assert "overloaded" in reasons
    for _, matchers in selectors(EXPRESSIONS[name]):
        assert set(matchers.get("reason", "overloaded").split("|")) <= reasons
        assert matchers.get("route", "/generate") == "/generate"  # the objective only covers /generate
        assert matchers.get("job", "unfog") in ("unfog", "haproxy")


def test_configuration_scrapes_the_job_of_the_rules() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    jobs = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    assert jobs == {"unfog": ["unfog:8000"], "prometheus": ["localhost:9090"]}
    configurations = {"prometheus.yml", "replicas.yml"}
    assert set(config["rule_files"]) == {path.name for path in FOLDER.glob("*.yml")} - configurations


def test_configuration_for_replicas_differs_only_in_the_targets() -> None:
    one, several = (yaml.safe_load((FOLDER / name).read_text()) for name in ("prometheus.yml", "replicas.yml"))
    jobs = {job.pop("job_name"): job for job in several.pop("scrape_configs")}
    alone = {job.pop("job_name"): job for job in one.pop("scrape_configs")}
    assert one == several
    # Each address of the name is a target with the label `instance`.
    assert jobs.pop("unfog") == {
        "dns_sd_configs": [{"names": ["unfog"], "type": "A", "port": 8000, "refresh_interval": "15s"}]
    }
    assert jobs.pop("haproxy")["static_configs"] == [{"targets": ["haproxy:8404"]}]
    del alone["unfog"]
    assert jobs == alone


def test_every_recorded_series_is_used() -> None:
    readers = [rule["expr"] for rule in ALERTS.values()] + list(RECORDED.values()) + [DASHBOARD.read_text()]
    assert [name for name in RECORDED if not any(name in reader for reader in readers)] == []


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_every_recorded_series_has_an_expected_value(name: str) -> None:
    cases = [case for group in GROUPS for case in group["promql_expr_test"] if name in case["expr"]]
    assert any(sample["value"] for case in cases for sample in case["exp_samples"])


@pytest.mark.parametrize("name", sorted(ALERTS))
def test_alerts_have_severity_description_and_runbook(name: str) -> None:
    alert = ALERTS[name]
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert set(alert["annotations"]) == {"summary", "description", "runbook"}
    assert all(alert["annotations"].values())
    headings = re.findall(r"^#+ (.+)$", OPERATIONS.read_text(), re.M)
    assert name in headings
    assert alert["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"


def test_runbook_has_only_sections_of_existing_alerts() -> None:
    assert sorted(re.findall(r"^### (Unfog\w+)$", OPERATIONS.read_text(), re.M)) == sorted(ALERTS)


def test_links_in_the_runbook_lead_to_a_section() -> None:
    text = OPERATIONS.read_text()
    anchors = {
        re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", text, re.M)
    }
    links = set(re.findall(r"\]\(#([\w-]+)\)", text))
    assert links
    assert links <= anchors


@pytest.mark.parametrize("name", sorted(ALERTS))
def test_alerts_have_a_case_that_fires_and_one_that_does_not(name: str) -> None:
    fires = [group for group in GROUPS if expected(group, name, "firing")]
    silent = [group for group in GROUPS if not expected(group, name, "firing") and expected(group, name, None)]
    assert fires
    # The case must have all series of the alert. Without them, the alert could not fire.
    needed = raw_metrics(ALERTS[name]["expr"])
    given = [{series["series"].split("{")[0] for series in group["input_series"]} for group in silent]
    assert any(needed <= names for names in given)
    # If the alert has `for`, it must be pending at some time.
    assert "for" not in ALERTS[name] or any(expected(group, name, "pending") for group in silent)


def test_promtool_accepts_the_configuration_and_the_rules() -> None:
    for arguments in (
        ("check", "config", "--lint=all", "--lint-fatal", FOLDER / "prometheus.yml"),
        ("check", "rules", "--lint=all", "--lint-fatal", FOLDER / "recording.yml", FOLDER / "alerts.yml"),
    ):
        checked = promtool(*arguments)
        assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_rules_pass_their_promtool_cases(path: Path) -> None:
    tested = promtool("test", "rules", path)
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.slow  # runs all cases again
def test_promtool_cases_fail_if_alerts_have_no_for(tmp_path: Path) -> None:
    alerts_with_for = {name for name, alert in ALERTS.items() if "for" in alert}
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    for group in groups:
        group["rules"] = [{key: value for key, value in rule.items() if key != "for"} for rule in group["rules"]]
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump({"groups": groups}))
    for path in CASES:
        cases = yaml.safe_load(path.read_text())
        cases["rule_files"] = [str(FOLDER / "recording.yml"), "alerts.yml"]
        (tmp_path / f"test-{path.name}").write_text(yaml.safe_dump(cases))
    tested = promtool("test", "rules", *sorted(tmp_path.glob("test-*.yml")))
    assert set(re.findall(r'alertname=\\"(\w+)\\"}", time', tested.stdout + tested.stderr)) == alerts_with_for
