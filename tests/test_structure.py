"""Rules for the imports of third-party packages, the settings in docker-compose.yml and the order of the tests."""

import ast
import re
import sys
from pathlib import Path

import pytest

from app.settings import Settings
from tests.conftest import FIRST

ROOT = Path(__file__).parents[1]


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported(source: str) -> set[str]:
    """Returns the top-level names of all imported modules, including imports inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").split(".")[0])
    return names


def test_only_the_runner_imports_torch() -> None:
    named = {str(path.relative_to(ROOT)) for path in sources("app") if "torch" in imported(path.read_text())}
    assert "app/runner/runner.py" in named
    assert all(name.startswith("app/runner/") for name in named)


def test_model_imports_only_torch_einops_and_safetensors_except_in_png_and_clip() -> None:
    allowed = sys.stdlib_module_names | {"model", "torch", "einops", "safetensors"}
    used = {str(path.relative_to(ROOT)): imported(path.read_text()) - allowed for path in sources("model")}
    assert {name: more for name, more in used.items() if more} == {
        "model/png.py": {"PIL", "numpy"},
        "model/clip.py": {"open_clip"},
    }


def test_files_whose_tests_start_first_exist() -> None:
    assert [name for name in FIRST if not (ROOT / name).is_file()] == []


def test_compose_passes_on_every_setting_except_host_port_and_folders() -> None:
    """A missing variable would have no effect although the operator sets it."""
    listed = set(re.findall(r"^      - (UNFOG_\w+)", (ROOT / "docker-compose.yml").read_text(), re.MULTILINE))
    fixed = {"UNFOG_HOST", "UNFOG_PORT", "UNFOG_CACHE_DIR", "UNFOG_DATA_DIR"}
    assert listed == {f"UNFOG_{field}".upper() for field in Settings.model_fields} - fixed


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import torch.nn as nn", {"torch"}),
        ("def f():\n    from torch import Tensor", {"torch"}),
        ("from .torch import x", set()),
    ],
)
def test_every_form_of_import_is_found(source: str, names: set[str]) -> None:
    assert imported(source) == names
