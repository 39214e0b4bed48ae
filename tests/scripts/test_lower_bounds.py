"""Tests that scripts.lower_bounds prints the lower bounds in pyproject.toml."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from scripts import lower_bounds as module
from scripts.lower_bounds import lower_bounds, runtime_requirements

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_each_requirement_is_pinned_to_its_lower_bound() -> None:
    requirements = ["torch>=2.13,<2.16", "prometheus-client>=0.21", "psycopg[binary]>=3.2.2,<4"]
    assert lower_bounds(requirements) == ["torch==2.13", "prometheus-client==0.21", "psycopg==3.2.2"]


@pytest.mark.parametrize("requirement", ["torch", "torch<3", "torch==2.13", "torch>=2.13rc1"])
def test_requirement_without_a_plain_lower_bound_is_rejected(requirement: str) -> None:
    with pytest.raises(ValueError, match="expected name>=version"):
        lower_bounds([requirement])


def test_command_pins_every_dependency_and_the_extras_of_the_service() -> None:
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    extras = project["optional-dependencies"]
    declared = project["dependencies"] + extras["traces"] + extras["postgres"] + extras["parquet"]
    command = [sys.executable, "-I", str(module.__file__), str(PYPROJECT)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert printed == [
        requirement.split(",")[0].replace("[binary]", "").replace(">=", "==") for requirement in declared
    ]
    assert printed == lower_bounds(runtime_requirements(PYPROJECT))
