"""The shell scripts' own words: what they are asked with, before anything is made or installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def call(tmp_path: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A script alone in a folder, where what it would make can be seen."""
    folder = tmp_path / "scripts"
    folder.mkdir(exist_ok=True)
    for script in (name, "setup.sh"):
        shutil.copy(SCRIPTS / script, folder)
    return subprocess.run([folder / name, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["audit", "environments", "nightly", "serve", "test"])
def test_help_is_printed_and_nothing_is_made(tmp_path: Path, name: str) -> None:
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
def test_a_wrong_argument_is_status_2_and_nothing_is_made(
    tmp_path: Path, name: str, arguments: tuple[str, ...]
) -> None:
    done = call(tmp_path, name, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"scripts/{name}" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["scripts"]
