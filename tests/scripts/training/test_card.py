"""The model card, the loss curves and the TensorBoard files of a finished run."""

import math
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt  # installed with rich
from PIL import Image

from app.settings import Settings
from scripts import train
from scripts.common.data.data_set import DataSet, ImageSet
from scripts.common.plots import plot_losses
from scripts.training.card import card, markdown
from scripts.training.recipe import load_recipe
from scripts.training.run import Run
from scripts.training.trainer import EpochResult
from tests.scripts.common.data.samples import NAMES, SIZE, write_folder

EPOCHS = 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run on the pictures of three classes, with files for TensorBoard."""
    folder = tmp_path_factory.mktemp("card")
    argv = [f"--data={write_folder(folder / 'pets', splits=True)}", f"--out={folder / 'my pets'}", "--tensorboard"]
    train.main([*argv, f"--epochs={EPOCHS}", "--compile=off", "--num-threads=1", "--device=cpu", "--limit=5"])
    yield folder / "my pets"


def test_card_names_the_data_the_recipe_and_the_commands(run: Path) -> None:
    text = (run / "README.md").read_text("utf-8")
    assert f"# my-pets\n\nA diffusion model that generates colour images of {SIZE}x{SIZE} pixels" in text
    assert f"Its classes are {', '.join(NAMES)}." in text
    assert f"scripts/serve --model 'my-pets={run / 'model.safetensors'}'" in text
    assert "- pets: 3 classes, 15 images for training, 9 for validation" in text
    assert "warning: the class 'cat' has only 5 images" in text
    assert f"\nepochs = {EPOCHS}\n" in text and "\nunet.num_classes = 3\n" in text
    assert f"![images of the classes after the last epoch](epochs/{EPOCHS:02d}.png)" in text
    assert (run / f"epochs/{EPOCHS:02d}.png").exists()


def test_curves_of_the_losses_are_drawn(run: Path) -> None:
    with Image.open(run / "losses.png") as image:
        assert image.width > 500


def test_tensorboard_has_the_losses_and_images_of_each_epoch(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard")).Reload()
    written = [float(line.split(",")[1]) for line in (run / "losses.csv").read_text().splitlines()[1:]]
    assert [event.value for event in found.Scalars("loss/training")] == pytest.approx(written, abs=1e-5)
    assert [event.step for event in found.Scalars("loss/validation")] == [*range(1, EPOCHS + 1)]
    assert [event.step for event in found.Images("images")] == [*range(1, EPOCHS + 1)]


def test_card_quotes_names_and_ignores_a_loss_that_is_not_a_number(tmp_path: Path) -> None:
    images = ImageSet(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    data = DataSet("odd", ("it's",), images, images, images)
    run = Run(tmp_path / "my $runs$", "auto", load_recipe("auto", data), 0, "odd", data.class_names)
    run.results = [EpochResult(1, 0.1, math.nan, (), 0.1), EpochResult(2, 0.1, 0.05, (), 0.1)]
    text = card(run, data, 1)
    assert "The checkpoint is that of epoch 2, which had the lowest validation loss, 0.05000." in text
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith(("scripts/serve", "python"))]
    path = str(run.folder / "model.safetensors")
    assert commands[0][-1] == f"my--runs-={path}"
    assert commands[1][3:6] == ["--checkpoint", path, "--label=it's"]
    assert "losses.png" not in text


def test_names_with_special_characters_are_shown_as_they_are(tmp_path: Path) -> None:
    names = ("*a*", "_b_", "[c](d)", "<e>", "`f`", "g|h", "~~i~~", "&amp;", "j\\_k", "l\n# m")
    images = ImageSet(torch.zeros(10, 1, 8, 8, dtype=torch.uint8), torch.arange(10))
    data = DataSet("# <odd> *data*", names, images, images, images)
    run = Run(tmp_path / "out", "auto", load_recipe("auto", data), 0, data.description, names)
    run.results = [EpochResult(1, 0.1, 0.05, (), 0.1)]
    blocks = MarkdownIt().parse(card(run, data, 1))
    shown = ["".join(part.content for part in block.children or () if part.type == "text") for block in blocks]
    (sentence,) = (text for text in shown if "Its classes are" in text)
    assert ", ".join(names).replace("\n", "\\n") in sentence
    (counts,) = (text for text in shown if text.startswith("images of each class"))
    assert all(f"{name} 1" in counts for name in names[:-1])
    assert any(f"description of the data: {data.description}." in text for text in shown)
    assert any(text.startswith("# <odd> *data*: 10 classes") for text in shown)
    assert any("It was trained for 1 epoch with the seed 0." in text for text in shown)


@pytest.mark.parametrize("text", ["# a", "- a", "+ a", "= a", "1. a", "12) a", "  ## a", "a # b - c 1. d"])
def test_marker_of_a_block_is_shown_as_text(text: str) -> None:
    (_, _, inline, _, _) = [*MarkdownIt().parse(f"- {markdown(text)}")[1:6]]
    assert "".join(part.content for part in inline.children or ()) == text.strip()


@pytest.mark.parametrize(
    ("folder", "name"),
    [("my pets", "my-pets"), ("_x", "x"), (".runs", "runs"), ("\u5199\u771f", "model"), ("a" * 70, "a" * 64)],
)
def test_model_is_served_under_a_name_that_the_service_accepts(tmp_path: Path, folder: str, name: str) -> None:
    run = Run(tmp_path / folder, "auto", load_recipe("default"), 0, "odd")
    assert run.name == name
    assert Settings(models=f"{name}=x.safetensors").models


def test_curves_are_drawn_for_a_name_with_dollar_signs(tmp_path: Path) -> None:
    folder = tmp_path / "run $_$"
    folder.mkdir()
    (folder / "losses.csv").write_text("epoch,train_loss,validation_loss\n1,0.1,0.2\n2,0.05,0.1\n")
    plot_losses([folder], folder / "losses.png")
    assert (folder / "losses.png").exists()
