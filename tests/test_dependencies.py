"""pyproject.toml declares every imported package, with tested version bounds."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
OWN = {"app", "model", "scripts"}
# The extras that a module may import in addition to the dependencies. The first matching path prefix applies.
MAY_USE = {
    "app/": ["parquet", "postgres", "ray", "redis", "traces"],
    "model/": ["clip"],
    "scripts/bench": ["train", "evaluate", "bench"],
    "scripts/": ["train", "evaluate", "clip", "diffusers", "docs", "parquet", "ray-data", "tensorboard"],
}
WITH_EXTRAS = ("scripts/benchmark/alternatives/", "scripts/evaluation/dataset_ray.py")
# The code uses private or unstable interfaces of these, so only tested minor versions are permitted.
BOUNDED_BY_MINOR = {"torch", "uvicorn"}
DISTRIBUTIONS = importlib.metadata.packages_distributions()


def normalized(name: str) -> str:
    """Returns the name of a distribution in the normalised form of package indexes (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def name_of(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found
    return normalized(found[0])


def declared(*extras: str) -> set[str]:
    requirements = [*PROJECT["dependencies"], *(r for extra in extras for r in EXTRAS[extra])]
    return {name_of(requirement) for requirement in requirements}


def third_party(source: str) -> set[str]:
    """Returns the third-party top-level packages that a source imports, including imports inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                names |= {alias.name.split(".")[0] for alias in node.names}
            case ast.ImportFrom(level=0):
                names.add((node.module or "").split(".")[0])
            case ast.Call(func=ast.Name("require"), args=[ast.Constant(str(module)), *_]):
                names.add(module.split(".")[0])
    return names - sys.stdlib_module_names - OWN


def imported_at_once(source: str) -> set[str]:
    """Returns the third-party packages that are imported together with the module, and not later in a function."""
    statements = [
        node
        for node in ast.parse(source).body
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]
    plain = [node for node in statements if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    return third_party("\n".join(map(ast.unparse, plain)))


def distributions_of(package: str) -> set[str]:
    """Returns the distributions that install a package. Assumes the same name if the package is not installed."""
    return {normalized(name) for name in DISTRIBUTIONS.get(package, [package])}


def sources() -> dict[str, str]:
    paths = sorted(path for package in OWN for path in (ROOT / package).rglob("*.py"))
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths}


def undeclared(path: str, source: str) -> set[str]:
    """Returns the imported packages that neither a dependency nor a permitted extra installs."""
    permitted = declared(*next(extras for prefix, extras in MAY_USE.items() if path.startswith(prefix)))
    return {package for package in third_party(source) if not distributions_of(package) & permitted}


def test_every_imported_package_is_declared() -> None:
    wrong = {path: undeclared(path, source) for path, source in sources().items()}
    assert {path: packages for path, packages in wrong.items() if packages} == {}


def test_scripts_import_packages_of_extras_only_when_they_need_them() -> None:
    """A script can therefore check its arguments without the extra. The modules of WITH_EXTRAS have no arguments."""
    found = {
        path: {package for package in imported_at_once(source) if not distributions_of(package) & declared()}
        for path, source in sources().items()
        if path.startswith(("scripts/", "model/")) and not path.startswith(WITH_EXTRAS)
    }
    assert {path: packages for path, packages in found.items() if packages} == {}


@pytest.mark.parametrize(
    ("source", "packages"),
    [
        ("import rich", {"rich"}),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import rich", set()),
        ("def f():\n    import rich", set()),
        ("try:\n    import rich\nexcept ImportError:\n    pass", {"rich"}),
    ],
)
def test_import_inside_a_function_does_not_count_as_imported_at_once(source: str, packages: set[str]) -> None:
    assert imported_at_once(source) == packages


@pytest.mark.parametrize(
    ("path", "source", "packages"),
    [
        ("app/main.py", "import h11, starlette.types, opentelemetry.trace, PIL", set()),
        ("app/main.py", "import matplotlib", {"matplotlib"}),
        ("model/unet.py", "import opentelemetry", {"opentelemetry"}),
        ("scripts/evaluate.py", "import aiohttp, matplotlib", {"aiohttp"}),
        ("scripts/benchmark/services.py", "import psutil", set()),
    ],
)
def test_import_from_an_extra_that_is_not_permitted_is_undeclared(path: str, source: str, packages: set[str]) -> None:
    assert undeclared(path, source) == packages


def test_every_dependency_is_imported() -> None:
    used = {
        name for source in sources().values() for package in third_party(source) for name in distributions_of(package)
    }
    assert declared() - used == set()


@pytest.mark.parametrize("requirement", [*PROJECT["dependencies"], *(r for e in EXTRAS.values() for r in e)])
def test_every_requirement_has_a_lower_and_an_upper_bound(requirement: str) -> None:
    assert re.fullmatch(r"[\w.-]+(\[\w+\])?>=[\d.]+,<[\d.]+(;.+)?|unfog\[[\w,-]+\]", requirement)


@pytest.mark.parametrize("name", sorted(BOUNDED_BY_MINOR))
def test_upper_bound_of_an_unstable_dependency_is_a_minor_version(name: str) -> None:
    (requirement,) = (r for r in PROJECT["dependencies"] if name_of(r) == name)
    assert re.search(r",<\d+\.[1-9]\d*$", requirement)


def test_constraints_are_exact_versions_within_the_declared_ranges() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {normalized(name): version for name, version in (line.split("==") for line in lines)}
    assert not {"torch", "torchvision", "unfog"} & pins.keys()
    extras = ("traces", "train", "evaluate", "clip", "docs", "parquet", "postgres")
    assert declared(*extras) - {"torch", "torchvision", "unfog"} <= pins.keys()
    for requirement in [*PROJECT["dependencies"], *(r for e in EXTRAS.values() for r in e)]:
        if (name := name_of(requirement)) in pins:
            assert is_permitted(pins[name], requirement), requirement


def is_permitted(version: str, requirement: str) -> bool:
    lower, upper = (numbers(bound) for bound in re.findall(r"[<>]=?([\d.]+)", requirement.partition(";")[0]))
    return lower <= numbers(version) < upper


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))


@pytest.mark.parametrize(
    ("source", "packages"),
    [
        ("import torch.nn as nn, os", {"torch"}),
        ("def f():\n    from starlette.types import Scope", {"starlette"}),
        ("from .torch import x\nfrom app import y", set()),
        ('require("open_clip", extra="clip")', {"open_clip"}),
    ],
)
def test_every_form_of_import_is_found(source: str, packages: set[str]) -> None:
    assert third_party(source) == packages
