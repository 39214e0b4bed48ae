"""Tests that the replacement for Grafana rejects errors in the provisioning, which Grafana would ignore."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.containers.grafana.grafana import ProvisioningError, read_dashboards, read_datasources

SOURCE = {"name": "Prometheus", "uid": "prometheus", "type": "prometheus", "access": "proxy", "url": "http://p:9090"}
DASHBOARD = {"uid": "one", "title": "One", "panels": [{"datasource": {"type": "prometheus", "uid": "prometheus"}}]}


def provision(folder: Path, sources: Any, provider: Any, **files: str) -> list[str]:
    """Writes provisioning files, reads them, and returns the uids of the dashboards."""
    for name in ("datasources", "dashboards", "files"):
        (folder / name).mkdir()
    (folder / "datasources/one.yml").write_text(yaml.safe_dump(sources))
    (folder / "dashboards/one.yml").write_text(yaml.safe_dump({"apiVersion": 1, "providers": [provider]}))
    for name, content in files.items():
        (folder / f"files/{name}.json").write_text(content)
    return list(read_dashboards(folder / "dashboards", read_datasources(folder / "datasources")))


def provider_of(folder: Path, **more: Any) -> dict[str, Any]:
    return {"name": "files", "type": "file", "options": {"path": str(folder / "files")}, **more}


def test_valid_provisioning_is_read(tmp_path: Path) -> None:
    files = {uid: json.dumps(DASHBOARD | {"uid": uid}) for uid in ("one", "two")}
    sources = {"apiVersion": 1, "datasources": [SOURCE]}
    assert provision(tmp_path, sources, provider_of(tmp_path), **files) == ["one", "two"]


@pytest.mark.parametrize(
    ("sources", "sentence"),
    [
        ({"apiVersion": 1, "datasources": [SOURCE | {"editible": True}]}, "unknown keys {'editible'}"),
        ({"apiVersion": 1, "datasources": [SOURCE, SOURCE]}, "a second datasource prometheus"),
        ({"apiVersion": 1, "datasources": [{"name": "x", "uid": "x", "type": "x", "access": "proxy"}]}, "missing"),
        ({"datasources": [SOURCE]}, "apiVersion"),
        ({"apiVersion": 1}, "no datasources"),
        ({"apiVersion": 1, "datasources": [SOURCE | {"uid": "other"}]}, "no datasource prometheus"),
    ],
)
def test_error_in_the_data_sources_is_reported(tmp_path: Path, sources: Any, sentence: str) -> None:
    with pytest.raises(ProvisioningError, match=sentence):
        provision(tmp_path, sources, provider_of(tmp_path), one=json.dumps(DASHBOARD))


@pytest.mark.parametrize(
    ("provider", "files", "sentence"),
    [
        (lambda folder: provider_of(folder, path="/x"), {"one": json.dumps(DASHBOARD)}, "unknown keys {'path'}"),
        (lambda folder: provider_of(folder, options={"path": "/nowhere"}), {}, "no dashboards in /nowhere"),
        (provider_of, {"one": "{"}, "one.json"),
        (provider_of, {"one": json.dumps(DASHBOARD), "two": json.dumps(DASHBOARD)}, "a second dashboard one"),
        (provider_of, {"one": json.dumps(DASHBOARD | {"id": 7})}, "an id"),
        (provider_of, {"one": json.dumps(DASHBOARD | {"title": ""})}, "no title"),
    ],
)
def test_error_in_the_dashboards_is_reported(
    tmp_path: Path, provider: Callable[[Path], dict[str, Any]], files: dict[str, str], sentence: str
) -> None:
    with pytest.raises(ProvisioningError, match=sentence):
        provision(tmp_path, {"apiVersion": 1, "datasources": [SOURCE]}, provider(tmp_path), **files)
