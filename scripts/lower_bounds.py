"""Prints each runtime requirement of a pyproject.toml at its lower bound, as a constraints file for pip.

Uses only the standard library, because scripts/environments runs it before it installs anything.
"""

import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

_LOWER_BOUND = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(\[\w+\])?>=(?P<version>[0-9.]+)(,|$)")


def runtime_requirements(pyproject: Path) -> list[str]:
    """Returns the requirements of the service: the dependencies and the extras that the service uses."""
    project = tomllib.loads(pyproject.read_text())["project"]
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *(each for name in ("traces", "postgres", "parquet") for each in extras[name])]


def lower_bounds(requirements: Iterable[str]) -> list[str]:
    """Converts `name>=1.2,<2` to `name==1.2`. Raises ValueError if a requirement does not start with a lower bound."""
    pins = []
    for requirement in requirements:
        match = _LOWER_BOUND.match(requirement)
        if not match:
            raise ValueError(f"{requirement}: expected name>=version")
        pins.append(f"{match['name']}=={match['version']}")
    return pins


if __name__ == "__main__":
    print(*lower_bounds(runtime_requirements(Path(sys.argv[1]))), sep="\n")
