"""Replaces Grafana in tests: reads the same provisioning files and serves the API routes that the tests use.

Grafana logs an error in its provisioning files and continues. This program exits with a one-line error.
"""

import base64
import json
import os
import re
import signal
import sys
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

# The keys that Grafana 11 supports. It ignores other keys, so here they are errors.
DATASOURCES = {"apiVersion", "prune", "datasources", "deleteDatasources"}
DATASOURCE = {"name", "type", "access", "orgId", "uid", "url", "user", "database", "basicAuth", "basicAuthUser"}
DATASOURCE |= {"withCredentials", "isDefault", "jsonData", "secureJsonData", "version", "editable"}
DASHBOARDS = {"apiVersion", "providers"}
PROVIDER = {"name", "orgId", "folder", "folderUid", "type", "options"}
PROVIDER |= {"disableDeletion", "updateIntervalSeconds", "allowUiUpdates"}
OPTIONS = {"path", "foldersFromFilesStructure"}
BUILT_IN = {"-- Grafana --", "-- Mixed --", "-- Dashboard --", "grafana"}

Json = dict[str, Any]


class ProvisioningError(Exception):
    """The provisioning files have an error. The message is one line."""


def check(holds: object, sentence: str) -> None:
    if not holds:
        raise ProvisioningError(sentence)


def read_files(folder: Path, known: set[str], inside: str) -> list[tuple[Path, Json]]:
    """Returns each entry of the list `inside` in the YAML files of the folder, with the path of its file.

    Raises ProvisioningError for a key that is not in `known`.
    """
    files = sorted(path for path in folder.glob("*") if path.suffix in (".yaml", ".yml"))
    check(files, f"{folder} contains no .yaml or .yml file")
    entries = []
    for path in files:
        try:
            content = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ProvisioningError(f"{path}: {error}") from error
        check(isinstance(content, dict) and content.get("apiVersion") == 1, f"{path}: apiVersion is not 1")
        check(set(content) <= known, f"{path}: unknown keys {set(content) - known}")
        check(content.get(inside), f"{path}: no {inside}")
        entries += [(path, entry) for entry in content[inside]]
    return entries


def read_datasources(folder: Path) -> dict[str, Json]:
    """Returns the data sources by uid."""
    found: dict[str, Json] = {}
    for path, source in read_files(folder, DATASOURCES, "datasources"):
        check(set(source) <= DATASOURCE, f"{path}: unknown keys {set(source) - DATASOURCE}")
        missing = {"name", "type", "uid", "url", "access"} - set(source)
        check(not missing, f"{path}: {missing} missing")
        check(source["access"] in ("proxy", "direct"), f"{path}: access {source['access']}")
        check(source["uid"] not in found, f"{path}: a second datasource {source['uid']}")
        found[source["uid"]] = source
    defaults = [uid for uid, source in found.items() if source.get("isDefault")]
    check(len(defaults) <= 1, f"several default datasources: {defaults}")
    return found


def read_dashboards(folder: Path, datasources: dict[str, Json]) -> dict[str, Json]:
    """Returns the dashboards by uid."""
    found: dict[str, Json] = {}
    for path, provider in read_files(folder, DASHBOARDS, "providers"):
        check(set(provider) <= PROVIDER, f"{path}: unknown keys {set(provider) - PROVIDER}")
        options = provider.get("options", {})
        check(set(options) <= OPTIONS, f"{path}: unknown options {set(options) - OPTIONS}")
        check(provider.get("name") and provider.get("type", "file") == "file", f"{path}: no name, or no files")
        files = sorted(Path(options.get("path", "/nowhere")).rglob("*.json"))
        check(files, f"{path}: no dashboards in {options.get('path')}")
        for file in files:
            dashboard = read_dashboard(file, datasources)
            check(dashboard["uid"] not in found, f"{file}: a second dashboard {dashboard['uid']}")
            found[dashboard["uid"]] = dashboard
    return found


def read_dashboard(file: Path, datasources: dict[str, Json]) -> Json:
    """Returns a dashboard. Raises ProvisioningError if a required key or a data source is missing."""
    try:
        dashboard: Json = json.loads(file.read_text())
    except ValueError as error:
        raise ProvisioningError(f"{file}: {error}") from error
    check(dashboard.get("uid") and dashboard.get("title"), f"{file}: no uid or no title")
    check(dashboard.get("id") is None, f"{file}: an id, which is only valid in the database of one Grafana")
    check(dashboard.get("panels"), f"{file}: no panels")
    for named in re.findall(r'"datasource": *({[^}]*}|"[^"]*")', json.dumps(dashboard)):
        source = json.loads(named)
        uid = source.get("uid") if isinstance(source, dict) else source
        check(uid in datasources or uid in BUILT_IN or uid[:1] == "$", f"{file}: no datasource {uid}")
    return dashboard


class Handler(BaseHTTPRequestHandler):
    """The routes of Grafana's API that the tests use."""

    datasources: dict[str, Json]
    dashboards: dict[str, Json]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/api/health":
            self.answer(200, {"database": "ok", "version": "test replacement"})
        elif not self.may_read():
            self.answer(401, {"message": "Unauthorized"})
        elif path.startswith("/api/dashboards/uid/"):
            dashboard = self.dashboards.get(path.rpartition("/")[2])
            self.answer(200 if dashboard else 404, {"dashboard": dashboard, "meta": {"provisioned": True}})
        elif match := re.match(r"/api/datasources/proxy/uid/([^/]+)/(.*)", self.path):
            self.proxy(*match.groups())
        else:
            self.answer(404, {"message": "Not found"})

    def may_read(self) -> bool:
        """True for anonymous access or for the user `admin`, if the environment enables it."""
        given = self.headers.get("Authorization")
        if given is None:
            return setting("AUTH_ANONYMOUS_ENABLED", "false") == "true"
        password = setting("SECURITY_ADMIN_PASSWORD", "admin")
        known = "Basic " + base64.b64encode(f"admin:{password}".encode()).decode()
        return given == known and setting("SECURITY_DISABLE_INITIAL_ADMIN_CREATION", "false") != "true"

    def proxy(self, uid: str, path: str) -> None:
        if uid not in self.datasources:
            return self.answer(404, {"message": "Data source not found"})
        try:
            with urllib.request.urlopen(f"{self.datasources[uid]['url']}/{path}", timeout=30) as answer:
                self.answer(answer.status, json.load(answer))
        except urllib.error.HTTPError as error:
            self.answer(error.code, json.load(error))
        except OSError as error:
            self.answer(502, {"message": str(error)})
        return None

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Logs only failures, not the frequent health checks."""
        if int(code) >= 400:
            super().log_request(code, size)

    def answer(self, status: int, body: Json) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def setting(name: str, default: str) -> str:
    """Returns the variable GF_<name>, or the default if it is unset or empty, as in Grafana."""
    return os.environ.get(f"GF_{name}") or default


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    provisioning = Path(setting("PATHS_PROVISIONING", "/etc/grafana/provisioning"))
    try:
        Handler.datasources = read_datasources(provisioning / "datasources")
        Handler.dashboards = read_dashboards(provisioning / "dashboards", Handler.datasources)
        home = setting("DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH", "")
        check(not home or Path(home).is_file(), f"no dashboard {home}")
    except ProvisioningError as error:
        sys.exit(f"test replacement for Grafana: {error}")
    Path("/var/lib/grafana/grafana.db").touch()  # where Grafana keeps its database
    ThreadingHTTPServer(("0.0.0.0", 3000), Handler).serve_forever()


if __name__ == "__main__":
    main()
