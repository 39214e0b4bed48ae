"""Tests --help and wrong arguments of the shell scripts, which must not create or install anything."""

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def call(tmp_path: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a copy of a script in an empty folder, where new files would be visible."""
    folder = tmp_path / "scripts"
    folder.mkdir(exist_ok=True)
    for script in (name, "setup.sh"):
        shutil.copy(SCRIPTS / script, folder)
    return subprocess.run([folder / name, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["audit", "environments", "nightly", "serve", "test"])
def test_help_prints_the_usage_and_creates_nothing(tmp_path: Path, name: str) -> None:
    done = call(tmp_path, name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: scripts/{name}")
    assert [path.name for path in tmp_path.iterdir()] == ["scripts"]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("audit", ("now",)),
        ("check", ("now",)),
        ("environments", ("oldest",)),
        ("environments", ("lowest", "newest")),
        ("nightly", ("--minutes",)),
        ("nightly", ("--minutes", "an hour")),
        ("nightly", ("--minutes=0",)),
    ],
)
def test_wrong_argument_exits_with_status_2_and_creates_nothing(
    tmp_path: Path, name: str, arguments: tuple[str, ...]
) -> None:
    done = call(tmp_path, name, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"scripts/{name}" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["scripts"]
