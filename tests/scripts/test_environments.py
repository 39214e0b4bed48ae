"""Tests scripts/environments in a copy of the project, with a fake pip and a fake pytest."""

from pathlib import Path

import pytest

from scripts.lower_bounds import lower_bounds, runtime_requirements
from tests.scripts.test_serve import PYTHONS, Project

FREEZE = "numpy==2.4.6\nnvidia-cublas==13.4.1.3\ntorch==2.13.0+cpu\ntorchmetrics==1.9.0\ntriton==3.9.0"

# Fake pytest: logs its arguments, and fails if the variable TESTS is set.
FAKE_PYTEST = """
import os, sys
with open("pytest.log", "a") as log:
    print(*sys.argv[1:], file=log)
sys.exit(os.environ["TESTS"] or 0)
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    made = Project(tmp_path)
    (made.root / "pytest.py").write_text(FAKE_PYTEST)
    return made


def run(project: Project, *arguments: str, tests: str = "") -> tuple[int, str]:
    status, _, err = project.run(*arguments, script="environments", PIP_FREEZE=FREEZE, TESTS=tests)
    return status, err


def test_both_ends_are_tested_and_only_lowest_has_constraints(project: Project) -> None:
    status, err = run(project)
    assert status == 0, err
    folder = project.root / "out" / "environments"
    assert [install[1] for install in project.installs] == [
        str(folder / "lowest.constraints.txt"),
        str(folder / "newest.constraints.txt"),
    ]
    assert (folder / "lowest.constraints.txt").read_text().split() == lower_bounds(
        runtime_requirements(project.pyproject)
    )
    assert (folder / "newest.constraints.txt").read_text() == ""
    tests = (project.root / "pytest.log").read_text().splitlines()
    assert (
        tests
        == ["-n 2 --dist loadfile tests/app tests/model tests/scripts/gpu", "-m slow tests/e2e/test_shipped.py"] * 2
    )
    assert "numpy==2.4.6" in err


@pytest.mark.parametrize(("name", "version"), [("lowest", "3.11"), ("newest", "3.13")])
def test_each_environment_needs_its_python_version(project: Project, name: str, version: str) -> None:
    for python in set(PYTHONS) - {f"python{version}"}:
        project.add_command(python, "exit 1")
    assert run(project, name)[0] == 0
    project.add_command(f"python{version}", "exit 1")
    status, err = run(project, name)
    assert status == 1
    assert err.endswith(f" found (tried: python{version}). Install python{version} and python{version}-venv\n")
    assert len(err.splitlines()) == 1


def test_environments_use_the_package_index_without_a_gpu(project: Project) -> None:
    project.remove_gpu()
    status, _, err = project.run(script="environments", PIP_FREEZE=FREEZE, PIP_CONFIGURATION="", TESTS="")
    assert status == 0, err
    assert [install[0] for install in project.installs] == ["--constraint"] * 2


def test_failed_tests_give_status_1_and_the_next_environment_still_runs(project: Project) -> None:
    status, err = run(project, tests="failed")
    assert status == 1
    assert "lowest: FAILED" in err
    assert "newest: FAILED" in err


def test_environment_is_created_again_on_each_run(project: Project) -> None:
    run(project, "newest")
    run(project, "newest")
    assert len(project.installs) == 2


def test_renew_writes_the_tested_versions_without_pytorch(project: Project) -> None:
    assert run(project, "renew")[0] == 0
    assert project.constraints.read_text() == "numpy==2.4.6\ntorchmetrics==1.9.0\n"


def test_renew_changes_nothing_after_failed_tests(project: Project) -> None:
    before = project.constraints.read_text()
    assert run(project, "renew", tests="failed")[0] == 1
    assert project.constraints.read_text() == before
