"""The shipped model `letters` in a running service. Letters that are drawn in other fonts judge its images."""

import io
import shutil
import string
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from model.spec import SHIPPED_LETTERS
from scripts import sample
from tests.docs.markdown import ROOT
from tests.e2e.conftest import start_service
from tests.e2e.service import PNG, Service, open_png, pngs

FONTS = Path(matplotlib.get_data_path()) / "fonts/ttf"  # DejaVu is not one of the fonts of the training
ALPHABET = list(string.ascii_uppercase)


@pytest.fixture(scope="module")
def letters() -> Iterator[Service]:
    with ExitStack() as stack:
        yield start_service(stack, SHIPPED_LETTERS, UNFOG_MODELS="default,letters")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """Returns 40 letters of each class in ten fonts of DejaVu, (26, 40, 784), with mean 0 and norm 1."""
    folder = tmp_path_factory.mktemp("fonts")
    for path in (*FONTS.glob("DejaVuS*-*.ttf"), FONTS / "DejaVuSans.ttf"):
        shutil.copy(path, folder)
    out = folder / "letters.npz"
    command = [sys.executable, ROOT / "examples/draw_letters.py", folder, out, "--count=40", "--test-count=1"]
    subprocess.run(command, check=True)
    return normal(np.load(out)["train_images"]).reshape(26, 40, -1)


def normal(images: np.ndarray) -> np.ndarray:
    """Returns images (N, 28, 28) as vectors (N, 784) with mean 0 and norm 1."""
    vectors = images.reshape(len(images), -1).astype(float)
    vectors -= vectors.mean(axis=1, keepdims=True)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_letters_are_most_similar_to_drawn_letters_of_their_class(letters: Service, drawn: np.ndarray) -> None:
    body = {"model": "letters", "labels": 2 * ALPHABET, "seed": 0, "sampler": "dpmpp", "num_steps": 10}
    images = np.stack([open_png(png)[0] for png in pngs(letters.post(body))])
    similarity = np.einsum("nd,lkd->nlk", normal(images), drawn).max(axis=2)  # (N, 26), to the nearest drawn letter
    recognised = similarity.argmax(axis=1) == np.arange(52) % 26
    assert recognised.mean() >= 0.6  # 77% of 104 images; other classes would have 4%


def test_guided_word_is_generated_again_by_the_script_with_the_same_bytes(letters: Service, tmp_path: Path) -> None:
    body = {"model": "letters", "labels": list("FOG"), "seed": 5, "num_steps": 10, "sampler": "dpmpp"}
    data = letters.post(body, PNG).content
    assert open_png(data)[1]["Guidance-Scale"] != "1"
    (tmp_path / "word.png").write_bytes(data)
    again = tmp_path / "again.png"
    sample.main([f"--like={tmp_path / 'word.png'}", "--compile=off", f"--out={again}"])
    assert again.read_bytes() == data


def test_letter_that_is_drawn_on_a_picture_is_recognised(letters: Service) -> None:
    """Pictures are normalised as those of digits: the letter can be anywhere, and dark on white."""
    data = letters.post({"model": "letters", "label": "B", "seed": 1, "num_steps": 10, "sampler": "dpmpp"}, PNG).content
    with Image.open(io.BytesIO(data)) as image:
        picture = Image.new("L", (140, 140), 255)
        picture.paste(Image.eval(image.resize((70, 70)), lambda level: 255 - level), (60, 10))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    form = {"model": "letters"}
    answer = letters.client.post("/recognize", files={"image": ("b.png", buffer.getvalue())}, data=form).json()
    assert answer["label"] == "B"
