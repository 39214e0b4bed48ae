"""Tests that the commands in the documents are valid: scripts, arguments, presets and paths."""

import shlex
from importlib import import_module

import pytest

from scripts.training.recipe import load_recipe
from tests.docs.markdown import ROOT, blocks, commands

NAMES = ("training", "evaluation", "evaluate", "datasets", "model-card", "benchmarks", "scaling")
NOTES = ("ablations", "speed", "clip-guidance")
DOCUMENTS = (*(f"docs/{name}.md" for name in NAMES), *(f"docs/results/notes/{name}.md" for name in NOTES))
PREFIX = "python -m scripts."
TRACKED_FOLDERS = ("docs/", "model/", "scripts/")


def script_commands(document: str) -> list[str]:
    return [command for command in commands(ROOT / document) if command.startswith(PREFIX)]


def words_of(command: str) -> list[str]:
    """Returns the module name and the arguments of a `python -m` command."""
    return shlex.split(command)[2:]


COMMANDS = list(dict.fromkeys(command for document in DOCUMENTS for command in script_commands(document)))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_script_command_is_in_a_bash_block(document: str) -> None:
    shown = sum(block.text.count(PREFIX) for block in blocks(ROOT / document))
    assert len(script_commands(document)) == shown > 0


@pytest.mark.parametrize("command", COMMANDS)
def test_script_accepts_the_documented_arguments(command: str) -> None:
    module, *arguments = words_of(command)
    import_module(module).build_parser().parse_args(arguments)


@pytest.mark.parametrize("command", [command for command in COMMANDS if "--preset" in command])
def test_documented_preset_exists(command: str) -> None:
    words = words_of(command)
    preset = words[words.index("--preset") + 1]
    assert load_recipe(str(ROOT / preset) if preset.endswith(".toml") else preset)


@pytest.mark.parametrize(
    "command", [command for command in COMMANDS if any(folder in command for folder in TRACKED_FOLDERS)]
)
def test_documented_paths_of_the_repository_exist(command: str) -> None:
    paths = [word for word in words_of(command) if word.startswith(TRACKED_FOLDERS)]
    assert [path for path in paths if not any(ROOT.glob(path))] == []
