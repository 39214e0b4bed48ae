"""Runs the commands of docs/your-own-data.md on a few pictures and one epoch."""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from PIL import Image

from tests.docs.markdown import ROOT, commands
from tests.e2e.conftest import start_service

COMMANDS = commands(ROOT / "docs/your-own-data.md")
FEW = {
    "python examples/draw_pictures.py": ["--count=3"],
    "python -m scripts.train": ["--epochs=1", "--compile=off", "--num-threads=1", "--device=cpu"],
    "python -m scripts.evaluate": ["--num-images=24", "--num-steps=2", "--compile=off", "--num-threads=1"],
    "python -m scripts.sample": ["--compile=off", "--num-threads=1", "--num-steps=2"],
}


def command(start: str) -> str:
    (found,) = (each for each in COMMANDS if each.startswith(start))
    return found


def run(start: str, folder: Path, **variables: str) -> str:
    """Runs the command of the document that starts so, with fewer pictures, epochs or steps. Returns its output."""
    program, *arguments = shlex.split(command(start))
    assert program == "python"
    arguments = [str(ROOT / each) if each.startswith("examples/") else each for each in arguments]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(
        [sys.executable, *arguments, *FEW[start]], cwd=folder, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which the pictures were drawn and the network was trained."""
    folder = tmp_path_factory.mktemp("own")
    run("python examples/draw_pictures.py", folder)
    said = run("python -m scripts.train", folder)
    assert "pictures: 12 classes, 24 images for training, 12 for validation, 32x32 pixels, colour" in said
    assert said.splitlines()[-1] == f"serve it: {command('scripts/serve --model')}"
    yield folder


def test_trained_model_is_served_and_the_request_saves_four_pictures(folder: Path) -> None:
    name, _, path = command("scripts/serve --model").rpartition(" ")[2].partition("=")
    with ExitStack() as stack:
        service = start_service(stack, folder / path, UNFOG_MODELS=f"{name}={folder / path}", UNFOG_CHECKPOINT="")
        line = command("curl ").replace("http://127.0.0.1:8000", service.url)
        subprocess.run(["bash", "-c", line], cwd=folder, check=True)
    with Image.open(folder / "fish.png") as image:
        assert (image.mode, image.size) == ("RGB", (2 * 4 * 32, 2 * 4 * 32))
        assert image.info["Label"] == "fish"


def test_pictures_are_generated_without_the_service(folder: Path) -> None:
    run("python -m scripts.sample", folder)
    with Image.open(folder / "fish.png") as image:
        assert (image.mode, image.size) == ("RGB", (4 * 4 * 32, 4 * 4 * 32))


def test_pictures_are_evaluated_with_classifiers_that_learn_from_them(folder: Path) -> None:
    said = run("python -m scripts.evaluate", folder, UNFOG_CACHE_DIR=str(folder / "cache"))
    assert "| recognised as asked | " in said
    assert "Each class has only 2 generated images, so one image changes the share of its class by 50.0" in said
    assert (folder / "runs/pictures/evaluation/evaluation.json").exists()


def test_every_command_of_the_document_is_run_here_or_installs() -> None:
    own = [*FEW, "scripts/serve --model", "curl "]
    others = [each for each in COMMANDS if not each.startswith(tuple(own))]
    assert others == [
        "scripts/serve --install train",
        ". .venv/bin/activate",
        "pip install -c constraints.txt -e '.[evaluate]'",
    ]
