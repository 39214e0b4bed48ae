"""Tests the files, profiles, services and limits in the docker commands of README.md and docs/deployment.md."""

import os
import shlex
import shutil
import subprocess
from itertools import pairwise

import pytest
import yaml

from tests.compose_limits import memory_limit
from tests.docs.markdown import ROOT, commands

DOCUMENTS = ("README.md", "docs/deployment.md")
COMPOSE = [command for name in DOCUMENTS for command in commands(ROOT / name) if "docker compose" in command]
READER_FILES = {"keys.yml"}  # the document tells the reader to write these
SERVICES = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]


def options(command: str, name: str) -> list[str]:
    """Returns the values of an option of a command."""
    words = shlex.split(command)
    return [value for option, value in pairwise(words) if option == name]


def has_compose() -> bool:
    return (
        bool(shutil.which("docker"))
        and not subprocess.run(["docker", "compose", "version"], capture_output=True).returncode
    )


def test_documents_have_the_commands_to_start_with_and_without_a_gpu() -> None:
    assert {"docker compose up", "docker compose -f docker-compose.yml -f docker-compose.cpu.yml up"} <= set(COMPOSE)


@pytest.mark.parametrize("command", COMPOSE)
def test_compose_command_names_existing_files_profiles_and_services(command: str) -> None:
    files = options(command, "-f")
    assert all((ROOT / file).is_file() for file in files if file not in READER_FILES)
    profiles = {profile for service in SERVICES.values() for profile in service.get("profiles", [])}
    assert set(options(command, "--profile")) <= profiles
    words = shlex.split(command)
    verb = next(word for word in words if word in ("up", "build", "run", "down"))
    for word in words[words.index(verb) + 1 :]:
        if word.startswith("-"):
            break
        assert word in SERVICES


@pytest.mark.skipif(not has_compose(), reason="needs docker compose")
@pytest.mark.parametrize("files", sorted({tuple(options(command, "-f")) for command in COMPOSE}), ids="+".join)
def test_compose_accepts_the_files_of_the_commands(files: tuple[str, ...]) -> None:
    arguments = [word for file in files if file not in READER_FILES for word in ("-f", file)]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("UNFOG_")}
    subprocess.run(["docker", "compose", *arguments, "config", "--quiet"], cwd=ROOT, env=variables, check=True)


@pytest.mark.parametrize(
    "command", [c for name in DOCUMENTS for c in commands(ROOT / name) if c.startswith("docker run")]
)
def test_docker_run_command_has_the_port_and_limits_of_the_compose_file(command: str) -> None:
    assert options(command, "-p") == ["127.0.0.1:8000:8000"]
    if "--memory" in command:
        assert options(command, "--memory") == [memory_limit("docker-compose.cpu.yml")]
        assert options(command, "--cap-drop") == ["ALL"]
        assert "--read-only" in command
