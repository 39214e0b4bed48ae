"""Tests the length, statements and commands of the README. Starts and uses the service with these commands."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.docs.markdown import DOCUMENTS, ROOT, blocks, commands, prose
from tests.fake_python import fake_python

README = ROOT / "README.md"
# PYTHONPATH, for example, would import other files than those of the clone.
SHELL = {name: value for name, value in os.environ.items() if not name.startswith(("UNFOG_", "PIP_", "PYTHON"))}
START_SECONDS = 240

# Fake Python. It creates venvs with a fake pip, which installs nothing but makes two folders importable: the packages
# of this test run, and the copy of the project.
PIP = f"""
import os, pathlib, sysconfig
site = pathlib.Path(sysconfig.get_path("purelib"))
(site / "project.pth").write_text(os.getcwd() + "\\n" + {sysconfig.get_path("purelib")!r})
"""
PYTHON = fake_python(PIP)


def test_readme_is_at_most_110_lines_and_900_words() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 110
    assert len(text.split()) <= 900


@pytest.mark.parametrize(
    ("document", "command"),
    [("README.md", "scripts/serve"), ("README.md", "scripts/test"), ("CONTRIBUTING.md", "scripts/check")],
)
def test_document_shows_the_command_in_a_code_block(document: str, command: str) -> None:
    assert command in commands(ROOT / document)
    assert os.access(ROOT / command, os.X_OK)


def test_commands_have_no_placeholders() -> None:
    assert [command for command in commands(README) if re.search(r"<|…|\b[A-Z]{2,}\b", command)] == []


def test_only_the_readme_and_the_gpu_check_say_that_the_service_has_never_run_on_a_gpu() -> None:
    counts = {str(path.relative_to(ROOT)): len(re.findall("ever run on a GPU", prose(path))) for path in DOCUMENTS}
    said = {name: count for name, count in counts.items() if count and name != "CHANGELOG.md"}
    assert said == {"README.md": 1, "docs/gpu.md": 1}


def test_file_that_selects_the_images_is_shorter_than_stated() -> None:
    (link, lines) = re.findall(r"\[One file\]\((\S+)\) of fewer than (\d+) lines", README.read_text())[0]
    assert len((ROOT / link).read_text().splitlines()) < int(lines)


@pytest.fixture(scope="module")
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        found: int = free.getsockname()[1]
        return found


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project."""
    folder = tmp_path_factory.mktemp("clone") / "unfog"
    for name in ("app", "model", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def served(clone: Path, port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Starts the service with the first command of the quickstart, on another port. Stops it after the tests."""
    programs = tmp_path_factory.mktemp("bin")
    (programs / "fake.py").write_text(PYTHON)
    (programs / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{programs / "fake.py"}" "$@"\n')
    (programs / "python3").chmod(0o755)
    variables = SHELL | {"PATH": f"{programs}:{SHELL['PATH']}", "UNFOG_PORT": str(port), "UNFOG_COMPILE": "off"}
    command = commands(README)[0]
    assert command == "scripts/serve"
    log = clone.parent / "log"
    with log.open("w") as file:
        process = subprocess.Popen(["bash", "-c", f"exec {command}"], cwd=clone, env=variables, stderr=file)
    try:
        wait_until_ready(process, port, log)
        yield clone
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def wait_until_ready(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    ends = time.monotonic() + START_SECONDS
    while time.monotonic() < ends:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
                assert answer.status == 200
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail(log.read_text())


def has_curl_with_json() -> bool:
    if not shutil.which("curl"):
        return False
    help_text = subprocess.run(["curl", "--help", "http"], capture_output=True, text=True).stdout
    return "--json" in help_text


@pytest.mark.skipif(not has_curl_with_json(), reason="needs curl 7.82 or newer")
def test_curl_command_saves_a_seven(served: Path, port: int, tmp_path: Path) -> None:
    (command,) = (command for command in commands(README) if command.startswith("curl "))
    subprocess.run(["bash", "-c", command.replace("localhost:8000", f"127.0.0.1:{port}")], cwd=tmp_path, check=True)
    with Image.open(tmp_path / "7.png") as image:
        assert image.size == (8 * 28, 8 * 28)
        assert image.info["Digit"] == "7"


def test_python_code_saves_sixteen_sevens(served: Path, port: int, tmp_path: Path) -> None:
    (block,) = blocks(README, "python")
    assert len([line for line in block.text.splitlines() if line]) == 4
    code = block.text.replace("localhost:8000", f"127.0.0.1:{port}")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    with Image.open(tmp_path / "sevens.png") as image:
        assert image.size == (4 * 4 * 28, 4 * 4 * 28)
        assert (image.info["Digit"], image.info["Seed"]) == ("7", "42")
