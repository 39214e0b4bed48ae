"""Uses fonts that are installed with matplotlib, so that the test needs no download."""

import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from scripts.common.data.data_set import load_data
from scripts.common.progress import Reporter
from tests.docs.markdown import ROOT

FONTS = Path(matplotlib.get_data_path()) / "fonts/ttf"  # some of these have only symbols
SCRIPT = ROOT / "examples/draw_letters.py"


def draw(fonts: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, SCRIPT, fonts, out, "--count=6", "--test-count=2", *more]
    return subprocess.run(arguments, capture_output=True, text=True)


@pytest.fixture(scope="module")
def fonts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fonts")
    for path in (*FONTS.glob("DejaVuS*-*.ttf"), FONTS / "DejaVuSans.ttf"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def letters(fonts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("letters") / "letters.npz"
    assert draw(fonts, path).returncode == 0
    return path


def test_letters_can_be_trained_on(letters: Path) -> None:
    with Reporter() as reporter:
        data = load_data(letters, reporter)
    assert data.class_names == tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    assert data.image_shape == (1, 28, 28)
    assert data.learn.labels.bincount().tolist() == [6] * 26
    assert data.test.labels.bincount().tolist() == [2] * 26


def test_letters_are_white_on_black_whole_and_different(letters: Path) -> None:
    images = np.load(letters)["train_images"]
    assert (images[:, [0, -1]] == 0).all() and (images[:, :, [0, -1]] == 0).all()
    assert (images.max(axis=(1, 2)) > 200).all()
    ink = images.astype(float).sum(axis=(1, 2))
    centre = (images * np.arange(28)).sum(axis=(1, 2)) / ink
    assert abs(centre.mean() - 13.5) < 1
    assert len({image.tobytes() for image in images}) == len(images)


def test_same_seed_draws_the_same_letters_and_another_seed_does_not(fonts: Path, letters: Path, tmp_path: Path) -> None:
    for seed in ("0", "1"):
        assert draw(fonts, tmp_path / f"{seed}.npz", f"--seed={seed}").returncode == 0
    first, again, other = (np.load(path)["train_images"] for path in (letters, tmp_path / "0.npz", tmp_path / "1.npz"))
    assert (first == again).all()
    assert (first != other).any(axis=(1, 2)).all()


def test_folder_without_fonts_gives_the_command_that_installs_them(tmp_path: Path) -> None:
    done = draw(tmp_path, tmp_path / "letters.npz")
    assert done.returncode == 1
    assert done.stderr == f"draw_letters: {tmp_path} has no fonts. Install them with: npm install --prefix {tmp_path}\n"


@pytest.mark.parametrize(
    ("name", "problem"), [("STIXSizOneSymReg.ttf", "has no A"), ("broken.ttf", "cannot be read: unknown file format")]
)
def test_font_that_cannot_draw_the_letters_is_named(fonts: Path, tmp_path: Path, name: str, problem: str) -> None:
    folder = shutil.copytree(fonts, tmp_path / "fonts")
    if (FONTS / name).exists():
        shutil.copy(FONTS / name, folder)
    else:
        (folder / name).touch()
    done = draw(folder, tmp_path / "letters.npz")
    assert (done.returncode, done.stderr) == (1, f"draw_letters: {folder / name} {problem}. Remove it\n")


@pytest.mark.parametrize("out", ["letters", "missing/letters.npz"])
def test_file_that_cannot_be_written_is_refused_before_the_letters_are_drawn(
    fonts: Path, tmp_path: Path, out: str
) -> None:
    done = draw(fonts, tmp_path / out)
    assert done.returncode == 2 and "must end in .npz, in a folder that exists" in done.stderr


def test_number_of_pictures_must_be_positive(fonts: Path, tmp_path: Path) -> None:
    done = draw(fonts, tmp_path / "letters.npz", "--test-count=0")
    assert done.returncode == 2 and "argument --test-count: invalid positive value: '0'" in done.stderr
