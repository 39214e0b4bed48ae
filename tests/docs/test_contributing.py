"""CONTRIBUTING.md names every place in the service that sleeps."""

import ast
from pathlib import Path

from tests.docs.document import codes
from tests.docs.markdown import ROOT

(RULE,) = (line for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if line.startswith("- In `app`, wait"))


def sleeps(path: Path) -> bool:
    """Returns True if the file uses `time.sleep` or `asyncio.sleep`, also without calling it."""
    return any(
        isinstance(node, ast.Attribute) and node.attr == "sleep" for node in ast.walk(ast.parse(path.read_text()))
    )


def test_only_the_named_files_and_folders_of_the_service_sleep() -> None:
    exceptions = [ROOT / name for name in codes(RULE) if name.startswith("app/")]
    sleeping = [path for path in (ROOT / "app").rglob("*.py") if sleeps(path)]
    assert [path for path in sleeping if not any(path.is_relative_to(exception) for exception in exceptions)] == []
    without_sleep = [each for each in exceptions if not any(path.is_relative_to(each) for path in sleeping)]
    assert without_sleep == [ROOT / "app/engine/watchdog.py"]
