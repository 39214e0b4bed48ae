"""Arrows point one way: app -> model, scripts -> model."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"app", "model", "scripts"}
MAY_IMPORT = {"app": {"app", "model"}, "model": {"model"}, "scripts": {"scripts", "model"}}


def imports(source: str, package: str) -> set[str]:
    """Which of our packages the source of a module of `package` imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(package if node.level else (node.module or "").split(".")[0])
    return names & PACKAGES


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_a_package_imports_only_what_it_may(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    offenders = {str(f.relative_to(ROOT)): imports(f.read_text(), package) - MAY_IMPORT[package] for f in files}
    assert {name: wrong for name, wrong in offenders.items() if wrong} == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import app.main", {"app"}),
        ("from scripts import train", {"scripts"}),
        ("def f():\n    from model.unet import UNet", {"model"}),
        ("from .unet import UNet", {"model"}),
        ("import application", set()),
    ],
)
def test_every_form_of_import_is_seen(source: str, found: set[str]) -> None:
    assert imports(source, "model") == found
