"""Tests imports: which packages and layers a module imports, that no import is circular, and which need no torch."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"app", "model", "scripts"}
MAY_IMPORT = {"app": {"app", "model"}, "model": {"model"}, "scripts": {"scripts", "app", "model"}}
# The layers of app that each layer may import. A module outside a folder is a layer. main and __main__ may import all.
LAYERS = {
    "errors": set(),
    "log_writer": set(),
    "logs": {"log_writer"},
    "metrics": {"errors"},
    "engine": {"engine", "errors"},
    "settings": {"engine"},
    "batches": {"batches", "errors", "metrics"},
    "runner": {"runner", "engine", "settings"},
    "tasks": {"tasks", "engine", "errors"},
    "api": {"api", "batches", "tasks", "engine", "errors", "metrics", "settings"},
    "server": {"server", "api", "engine", "errors", "logs", "metrics", "settings"},
    "ray": {"ray", "main", "server", "api", "errors", "logs", "settings"},
}
# These modules, and packages with all their modules, do not import torch. Its import takes more than a second, which
# only those who compute with tensors must wait for.
WITHOUT_TORCH = (
    "app.engine",
    "app.ray.proxy",
    "app.settings",
    "app.tasks",
    "app.__main__",
    "model.comparison",
    "model.editing",
    "model.inpainting",
    "model.noisy_image",
    "model.paths",
    "model.png",
    "model.prompts",
    "model.recognition",
    "model.schedule",
    "model.spec",
)
LONGEST_CHAIN = 9  # modules in the longest permitted import chain of app


def modules(package: str) -> dict[str, Path]:
    """Returns the files of a package by module name."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str, module: str, known: set[str]) -> set[str]:
    """Returns the modules in `known` that the source imports, including imports inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*module.split(".")[: -node.level], *filter(None, [node.module])])
            base = base if node.level else node.module or ""
            names |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names}
    return names


@cache
def graph(package: str) -> dict[str, set[str]]:
    """Returns the imports between the modules of a package, without the package itself."""
    files = modules(package)
    known = set(files)
    return {
        module: (imports(path.read_text(), module, known) & known) - {module, package} for module, path in files.items()
    }


def layer_of(module: str) -> str:
    return module.split(".")[1]


def chain_from(module: str, edges: dict[str, set[str]], above: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Returns the longest import chain that starts with the module. Fails if the imports are circular."""
    assert module not in above, f"circular imports: {' -> '.join([*above, module])}"
    below = [chain_from(each, edges, (*above, module)) for each in edges[module]]
    return (module, *max(below, key=len, default=()))


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_package_imports_only_permitted_packages(package: str) -> None:
    files = modules(package)
    assert files
    wrong = {}
    for module, path in files.items():
        found = {name.split(".")[0] for name in imports(path.read_text(), module, set(files))} & PACKAGES
        wrong[module] = found - MAY_IMPORT[package]
    assert {module: found for module, found in wrong.items() if found} == {}


def test_layer_of_app_imports_only_lower_layers() -> None:
    edges = {module: found for module, found in graph("app").items() if module != "app"}
    assert {layer_of(module) for module in edges} == {*LAYERS, "main", "__main__"}
    wrong = {
        (module, imported)
        for module, found in edges.items()
        for imported in found
        if layer_of(module) in LAYERS and layer_of(imported) not in LAYERS[layer_of(module)]
    }
    assert wrong == set()


def test_only_the_engine_imports_what_its_lock_protects() -> None:
    protected = {"app.engine.admission", "app.engine.backlog"}
    assert {module for module, found in graph("app").items() if found & protected} - protected == {"app.engine.engine"}


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_imports_are_not_circular(package: str) -> None:
    edges = graph(package)
    assert all(chain_from(module, edges) for module in edges)


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_module_is_imported_without_torch(name: str) -> None:
    found = [module for module in modules(name.split(".")[0]) if module == name or module.startswith(f"{name}.")]
    assert found
    code = f"import sys, {', '.join(found)}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_longest_import_chain_of_app_is_within_the_limit() -> None:
    longest = max((chain_from(module, graph("app")) for module in graph("app")), key=len)
    assert len(longest) <= LONGEST_CHAIN, " -> ".join(longest)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import app.main", {"app.main"}),
        ("from app import main", {"app.main"}),
        ("from app import VERSION", {"app"}),
        ("from app.main import create_app", {"app.main"}),
        ("def f():\n    from app.api.native import generate", {"app.api.native.generate"}),
        ("from .main import create_app", {"app.main"}),
        ("from . import main", {"app.main"}),
        ("import application", {"application"}),
    ],
)
def test_every_form_of_import_is_found(source: str, found: set[str]) -> None:
    assert imports(source, "app.command", {"app", "app.main", "app.api.native.generate"}) == found


def test_circular_import_is_found() -> None:
    with pytest.raises(AssertionError, match="a -> b -> a"):
        chain_from("a", {"a": {"b"}, "b": {"a"}})
