"""The programs and commands of the tutorials run, and print what the tutorials say."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from PIL import Image

from model.spec import SHIPPED
from tests.docs.document import Document, Example, run_bash
from tests.docs.markdown import ROOT
from tests.docs.test_api_document import BASE_URL, by_line, needs_curl
from tests.e2e.conftest import start_service
from tests.e2e.service import PNG, Service

FIRST_STEPS = Document("first-steps.md")
INSIDE = Document("inside.md")
COMMANDS = FIRST_STEPS.examples("bash")
(PROGRAM,) = FIRST_STEPS.examples("python")


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with ExitStack() as stack:
        yield start_service(stack, SHIPPED, UNFOG_MAX_BATCH="32", UNFOG_REQUEST_TIMEOUT="300")


@pytest.fixture(scope="module")
def seven(service: Service) -> bytes:
    """The file of the first command, which later commands read."""
    return service.post({"digit": 7, "seed": 42, "scale": 8}, PNG).content


@needs_curl
@pytest.mark.parametrize("example", COMMANDS, ids=by_line)
def test_command_of_first_steps_runs_and_writes_its_picture(
    service: Service, seven: bytes, example: Example, tmp_path: Path
) -> None:
    (tmp_path / "seven.png").write_bytes(seven)
    script = example.text.replace(BASE_URL, service.url)
    printed = run_bash(script, tmp_path)
    assert "cmp " not in script or printed == "identical\n"
    for name in re.findall(r"-o (\S+)", script):
        with Image.open(tmp_path / name) as image:
            image.load()


def test_program_of_first_steps_saves_two_pictures(service: Service, tmp_path: Path) -> None:
    run(PROGRAM.text.replace(BASE_URL, service.url), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seven-0.png", "seven-1.png"]


def test_program_without_the_service_writes_a_seven(tmp_path: Path) -> None:
    program, _ = INSIDE.examples("python")
    assert f"It prints `{run(program.text, tmp_path).strip()}`" in INSIDE.text
    with Image.open(tmp_path / "seven.png") as image:
        assert image.size == (280, 280)


def test_program_of_the_scheduler_prints_the_documented_steps(tmp_path: Path) -> None:
    _, program = INSIDE.examples("python")
    lines = run(program.text, tmp_path).splitlines()
    (output,) = INSIDE.examples("text")
    before, after = output.text.split("...\n")
    assert lines[:3] == before.splitlines()
    assert lines[-3:-1] == after.splitlines()


def run(program: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
