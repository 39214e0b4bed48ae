"""The release: version, changelog, package metadata and the workflows that run the tests and publish."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = PROJECT["version"]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
KINDS = {"Added", "Changed", "Fixed", "Removed", "Deprecated", "Security"}


def sections() -> dict[str, str]:
    """Returns the text of each section of the changelog by its heading, in order."""
    _, *parts = re.split(r"^## (.+)$", CHANGELOG, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_changelog_begins_with_unreleased_and_the_version_with_its_date() -> None:
    unreleased, newest, *_ = sections()
    assert unreleased == "[Unreleased]"
    assert re.fullmatch(rf"\[{re.escape(VERSION)}\] - \d{{4}}-\d\d-\d\d", newest)


@pytest.mark.parametrize("heading", sections())
def test_changelog_entries_are_grouped_and_have_one_line(heading: str) -> None:
    text = sections()[heading]
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= KINDS
    entries = [line for line in text.splitlines() if line.startswith("- ")]
    assert all(line.endswith(".") and len(line) <= 160 for line in entries)
    assert not re.findall(r"^[ \t]+\S", text, re.MULTILINE)  # no continued lines, no nested lists


def test_openapi_document_has_the_version() -> None:
    assert json.loads((ROOT / "docs" / "openapi.json").read_text())["info"]["version"] == VERSION


def test_project_is_private_and_lists_the_supported_python_versions() -> None:
    assert "Private :: Do Not Upload" in PROJECT["classifiers"]
    assert "Typing :: Typed" in PROJECT["classifiers"]
    assert "Programming Language :: Python :: 3.11" in PROJECT["classifiers"]
    assert PROJECT["requires-python"] == ">=3.11"


@pytest.mark.parametrize("package", ["app", "model", "scripts"])
def test_package_is_marked_as_typed(package: str) -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "py.typed" in data[package]
    assert (ROOT / package / "py.typed").read_bytes() == b""


def test_wheel_contains_every_file_of_the_packages(tmp_path: Path) -> None:
    folders = ["app", "model", "scripts"]
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, check=True, capture_output=True, text=True)
    expected = {line for line in listed.stdout.splitlines() if Path(line).suffix not in ("", ".sh")}
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for line in expected:
        (tmp_path / line).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / line, tmp_path / line)

    build = "from setuptools import build_meta; build_meta.build_wheel('wheels')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)

    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == expected


@pytest.mark.parametrize("path", WORKFLOWS, ids=[path.stem for path in WORKFLOWS])
def test_workflow_runs_the_tests_with_few_permissions_and_a_timeout(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    commands = [step["run"].split()[0] for step in steps if "run" in step]
    assert "scripts/test" in commands
    assert all((ROOT / command).is_file() for command in commands if command.startswith("scripts/"))
    assert workflow["permissions"] == {"contents": "read"}
    writers = [name for name, job in workflow["jobs"].items() if "permissions" in job]
    assert all("scripts/test" not in str(workflow["jobs"][name]["steps"]) for name in writers)
    assert all(0 < job["timeout-minutes"] <= 120 for job in workflow["jobs"].values())


def test_release_notes_of_the_workflow_are_the_section_of_the_version(tmp_path: Path) -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    steps = workflow["jobs"]["release"]["steps"]
    (command,) = (step["run"] for step in steps if step.get("run", "").startswith("awk"))
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    subprocess.run(
        ["bash", "-ec", command],
        cwd=tmp_path,
        env={"GITHUB_REF_NAME": f"v{VERSION}", "PATH": "/usr/bin:/bin"},
        check=True,
    )
    (heading,) = (heading for heading in sections() if heading.startswith(f"[{VERSION}]"))
    assert (tmp_path / "notes.md").read_text().strip() == sections()[heading].strip()
