"""Evaluates fake networks that return chosen images, so that the expected figures are known."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model import checkpoint
from model.checkpoint import CheckpointConfig, Probe
from model.pixels import from_pixels
from model.schedule import ScheduleConfig
from scripts import evaluate, train_classifiers
from scripts.common.data.data_set import DataSet, ImageSet, load_data
from scripts.common.drawing import Drawer
from scripts.common.errors import ScriptError
from scripts.common.progress import Reporter
from scripts.evaluation import classifier_training, own_data, tables
from scripts.evaluation.classifiers import load_classifier
from scripts.evaluation.samples import references_of
from tests.scripts.common.data.samples import encoded
from tests.scripts.evaluation.bars import space_of_pixels
from tests.scripts.evaluation.test_samples import unique_images
from tests.tiny import tiny_unet

NAMES, SIZE, EACH = ("blue", "green", "red"), 12, 80
OTHER_NAMES = ("blue", "green", "violet")


def write_colours(folder: Path, *, each: int = EACH, tests: int = EACH // 4, names: tuple[str, ...] = NAMES) -> Path:
    """Writes pictures of one noisy colour for each class, in the splits `train` and `test`."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", each), ("test", tests)):
        for label, name in enumerate(names):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 80, (SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)
                pixels[..., 2 - label] += 150
                (folder / split / name / f"{number:02d}.png").write_bytes(encoded(pixels.numpy()))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the data `colours`, the checkpoint `tiny.safetensors` for it, and a cache for the classifiers."""
    folder = tmp_path_factory.mktemp("own")
    write_colours(folder / "colours")
    network = tiny_unet(image_channels=3, image_size=SIZE, num_classes=3, num_steps=10, widths=(8, 8))
    config = CheckpointConfig(
        unet=network.config,
        class_names=NAMES,
        schedule=ScheduleConfig(num_steps=10),
        training={"label_drop": 0.1},
        probe=Probe(digit=0, num_steps=2),
    )
    checkpoint.save(folder / "tiny.safetensors", network, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNFOG_CACHE_DIR", str(folder / "cache"))
        patch.setattr(tables, "FEWEST_IMAGES", 50)
        patch.setattr("scripts.evaluation.own_data.spaces_for_pictures", lambda *_: (space_of_pixels(),))
        patch.setattr(classifier_training, "MOST_EPOCHS", 12)
        yield folder


@pytest.fixture(scope="module")
def data(folder: Path) -> DataSet:
    with Reporter() as reporter:
        return load_data(folder / "colours", reporter)


def run(folder: Path, out: Path, *more: str) -> dict[str, Any]:
    fixed = ["--compile=off", "--num-steps=2", f"--checkpoint={folder / 'tiny.safetensors'}", f"--out={out}"]
    evaluate.main(["pictures", f"--data={folder / 'colours'}", *fixed, *more])
    return tables.read_evaluation(out)


def refusal_of(capsys: pytest.CaptureFixture[str], main: Any, arguments: list[str]) -> str:
    with pytest.raises(SystemExit):
        main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    return line


def draws(monkeypatch: pytest.MonkeyPatch, images: Tensor) -> None:
    """Makes every checkpoint generate these images, uint8 (N, C, H, W)."""
    monkeypatch.setattr(Drawer, "draw", lambda self, y, *args, **options: from_pixels(images[: len(y)]))


def of_each_class(data: DataSet, split: str, labels: list[int]) -> Tensor:
    """Returns the first 20 images of each of `labels`, alternating between the labels."""
    part = getattr(data, split)
    return torch.stack([part.images[part.labels == label][:20] for label in labels], dim=1).flatten(0, 1)


def test_generated_copies_of_held_out_pictures_get_perfect_figures(
    folder: Path, data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws(monkeypatch, of_each_class(data, "test", [0, 1, 2]))
    found = run(folder, tmp_path, "--num-images=60")
    assert found["judge"]["accuracy"] == found["extractor"]["accuracy"] == 1
    assert found["frechet"] == pytest.approx(0, abs=1e-3)
    assert found["judge_frechet"] == pytest.approx(0, abs=1e-3)
    assert found["clip_frechet"] == pytest.approx(0, abs=1e-3)
    assert (found["memorised"], found["manifold"]["precision"]) == (0, 1)
    assert found["class_names"] == list(NAMES)
    assert {path.name for path in tmp_path.iterdir()} >= {"evaluation.md", "confusion.png", "nearest.png"}


def test_pictures_of_another_class_are_not_recognised(
    folder: Path, data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draws(monkeypatch, of_each_class(data, "test", [0, 1, 1]))
    found = run(folder, tmp_path, "--num-images=60")
    assert found["judge"]["per_class"] == [1, 1, 0]
    assert found["judge"]["confusion"][2] == [0, 20, 0]
    assert found["frechet_ratio"] > 10
    assert "| worst class | red: 0.00% | " in capsys.readouterr().out
    assert tables.as_run("run", found)[6] == "0.0% (red)"


def test_copies_of_training_pictures_are_reported(
    folder: Path, data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws(monkeypatch, of_each_class(data, "learn", [0, 1, 2]))
    found = run(folder, tmp_path, "--num-images=60")
    assert found["memorised"] == 1
    assert any(note.startswith("100.0% of the images are nearly copies") for note in found["notes"])


def test_real_images_of_a_distance_are_those_that_the_extractor_has_not_learned(
    folder: Path, data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNFOG_CACHE_DIR", str(tmp_path / "cache"))
    learned: dict[str, set[bytes]] = {}
    train = classifier_training.train_and_save

    def train_and_save(kind: str, path: Path, to_learn: DataSet, *args: Any) -> None:
        learned[kind] = unique_images(to_learn.learn)
        train(kind, path, to_learn, *args)

    monkeypatch.setattr(own_data, "train_and_save", train_and_save)
    draws(monkeypatch, of_each_class(data, "learn", [0, 1, 2]).repeat(2, 1, 1, 1))
    found = run(folder, tmp_path / "out", "--num-images=120")
    real, everything = references_of(data).real, unique_images(data.learn)
    assert real.labels.bincount().tolist() == [EACH // 4] * 3
    assert learned == {"judge": everything, "extractor": everything - unique_images(real)}
    assert (found["num_images"], found["num_compared"], found["num_held_out"]) == (120, 60, 60)
    note = "Distances, precision, recall and coverage are those of the first 60 images, because"
    assert any(each.startswith(note) for each in found["notes"])


def test_classifiers_are_cached_for_each_recipe(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: DataSet
) -> None:
    monkeypatch.setenv("UNFOG_CACHE_DIR", str(tmp_path / "cache"))
    draws(monkeypatch, of_each_class(data, "test", [0, 1, 2]))
    trained: list[str] = []
    train = classifier_training.train_and_save
    monkeypatch.setattr(own_data, "train_and_save", lambda kind, *args: (trained.append(kind), train(kind, *args)))
    for flip in ((), (), ("--flip",)):
        run(folder, tmp_path / "out", "--num-images=60", *flip)
    assert trained == ["judge", "extractor", "judge", "extractor"]
    assert len(list((tmp_path / "cache/classifiers").iterdir())) == 4


def test_few_images_have_notes_instead_of_figures(
    folder: Path, data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws(monkeypatch, of_each_class(data, "test", [0, 1, 2]))
    found = run(folder, tmp_path, "--num-images=12")
    assert found["num_images"] == 12
    assert (found["frechet"], found["manifold"]) == (None, None)
    assert [note.partition(":")[0] for note in found["notes"]] == [
        "Too few generated images for a Fréchet distance",
        "Too few generated images for precision, recall and coverage",
        "Each class has only 4 generated images, so one image changes the share of its class by 25.0 percentage "
        "points.",
    ]
    assert tables.as_run("small", found)[-3:] == ["-", "-", "-"]


def test_two_pictures_of_each_class_are_evaluated_without_a_distance(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = write_colours(tmp_path / "few", each=2, tests=1)
    with Reporter() as reporter:
        draws(monkeypatch, of_each_class(load_data(few, reporter), "test", [0, 1, 2]).repeat(2, 1, 1, 1))
    found = run(folder, tmp_path / "out", f"--data={few}")
    assert (found["num_images"], found["num_compared"]) == (6, 0)
    assert (found["frechet"], found["manifold"], found["memorised"]) == (None, None, 0)
    kind = "training images that the extractor has not learned"
    assert f"Too few {kind} for a Fréchet distance: 0, at least 50 needed." in found["notes"]


@pytest.mark.parametrize(("asked", "count"), [((), 3 * EACH), (("--num-images=400",), 399)])
def test_images_are_as_many_of_each_class_as_training_images_unless_a_number_is_given(
    folder: Path,
    data: DataSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    asked: tuple[str, ...],
    count: int,
) -> None:
    draws(monkeypatch, of_each_class(data, "test", [0, 1, 2]).repeat(7, 1, 1, 1))  # 420 images
    assert run(folder, tmp_path, *asked)["num_images"] == count
    assert f"Generating {count} images, {count // 3} of each class" in capsys.readouterr().out


def test_own_judge_is_used_and_one_for_other_classes_is_refused(
    folder: Path,
    data: DataSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = write_colours(tmp_path / "others", names=OTHER_NAMES)
    for name, path in (("own", folder / "colours"), ("other", other)):
        out = f"--out={tmp_path / name}.safetensors"
        train_classifiers.main(["judge", f"--data={path}", out, "--epochs=20", "--width=8"])
    draws(monkeypatch, of_each_class(data, "test", [0, 1, 2]))
    found = run(folder, tmp_path / "out", "--num-images=60", f"--judge={tmp_path / 'own.safetensors'}")
    assert found["judge"]["accuracy"] == 1
    capsys.readouterr()
    wrong = ["pictures", f"--data={folder / 'colours'}", f"--checkpoint={folder / 'tiny.safetensors'}"]
    line = refusal_of(capsys, evaluate.main, [*wrong, f"--judge={tmp_path / 'other.safetensors'}"])
    assert "recognises 3 classes of 3x12x12 images, from 'blue' to 'violet', so it cannot judge" in line


def test_checkpoint_with_other_classes_than_the_data_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_colours(tmp_path / "others", each=4, names=OTHER_NAMES)
    line = refusal_of(
        capsys, evaluate.main, ["pictures", f"--data={other}", f"--checkpoint={folder / 'tiny.safetensors'}"]
    )
    assert "--data has 3 classes ('blue' to 'violet') and images of 3x12x12, but the checkpoint has 3 classes" in line
    assert line.endswith(". The class 'violet' is 'red' there. Give the data on which the checkpoint was trained")


def test_classifier_of_own_data_does_not_overwrite_the_shipped_ones(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal_of(capsys, train_classifiers.main, ["judge", f"--data={folder / 'colours'}"])
    assert "--data needs --out" in line


@pytest.mark.slow  # it trains three classifiers
def test_classifier_in_the_cache_that_is_damaged_or_of_other_classes_is_trained_again(
    folder: Path, data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNFOG_CACHE_DIR", str(tmp_path / "cache"))
    draws(monkeypatch, of_each_class(data, "test", [0, 1, 2]))
    before = run(folder, tmp_path / "out", "--num-images=60")
    for path in (tmp_path / "cache/classifiers").iterdir():
        path.write_bytes(path.read_bytes()[:1000])
    assert run(folder, tmp_path / "out", "--num-images=60") == before
    for path in (tmp_path / "cache/classifiers").iterdir():
        of_digits = f"scripts/evaluation/weights/{path.stem.partition('-')[0]}.safetensors"
        shutil.copy(of_digits, path)
    assert run(folder, tmp_path / "out", "--num-images=60") == before


@pytest.mark.parametrize(
    ("counts", "wanted", "message"),
    [
        ((4, 0, 4), 60, "the class 'green' has no test image to compare with"),
        ((4, 4, 4), 2, "--num-images 2 is too small: each of the 3 classes needs an image"),
    ],
)
def test_images_that_cannot_be_compared_are_refused(counts: tuple[int, ...], wanted: int, message: str) -> None:
    learn, test = (
        ImageSet(torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8), labels)
        for labels in (torch.arange(3), torch.arange(3).repeat_interleave(torch.tensor(counts)))
    )
    with Reporter() as reporter, pytest.raises(ScriptError, match=re.escape(message)):
        own_data.count_for(DataSet("x", NAMES, learn, test, test), wanted, reporter)


def test_names_with_special_characters_do_not_break_the_table_and_the_plot(
    folder: Path, data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    special = replace(data, class_names=("US$ $x", "a|b", "$\\bad$"))
    monkeypatch.setattr(own_data, "load_data", lambda *args: special)
    monkeypatch.setattr(Drawer, "class_names", property(lambda self: special.class_names))
    draws(monkeypatch, of_each_class(data, "test", [0, 1, 1]))
    run(folder, tmp_path, "--num-images=60")
    assert "a\\|b: 100.0%" in capsys.readouterr().out
    assert (tmp_path / "confusion.png").exists()


@pytest.mark.parametrize("has_learned_all", [True, False])
def test_note_says_that_a_given_extractor_has_learned_the_real_images(
    folder: Path,
    data: DataSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    has_learned_all: bool,
) -> None:
    if has_learned_all:
        monkeypatch.setattr(train_classifiers, "own_data_for", lambda kind, whole: whole)
    extractor = tmp_path / "extractor.safetensors"
    train_classifiers.main(["extractor", f"--data={folder / 'colours'}", f"--out={extractor}", "--epochs=1"])
    learned = 3 * EACH if has_learned_all else 3 * EACH * 3 // 4
    assert f"{learned} training images" in load_classifier("extractor", extractor).facts["data"]
    draws(monkeypatch, of_each_class(data, "test", [0, 1, 2]))
    run(folder, tmp_path / "out", "--num-images=60", f"--extractor={extractor}")
    note = "note: the extractor has learned all training pictures"
    assert (note in capsys.readouterr().out) is has_learned_all


def test_output_that_cannot_be_written_is_noticed_before_the_classifiers_are_trained(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(own_data, "train_and_save", lambda *args: pytest.fail("it has begun"))
    monkeypatch.setenv("UNFOG_CACHE_DIR", str(tmp_path / "cache"))
    checkpoint_file = f"--checkpoint={folder / 'tiny.safetensors'}"
    arguments = ["pictures", f"--data={folder / 'colours'}", checkpoint_file, f"--out={tmp_path / 'file'}"]
    assert "File exists" in refusal_of(capsys, evaluate.main, arguments)


def test_evaluation_in_the_folder_of_the_data_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder / "colours"
    arguments = ["pictures", f"--data={data}", f"--checkpoint={folder / 'tiny.safetensors'}", f"--out={data / 'out'}"]
    assert "is in the folder of the data. Choose another one" in refusal_of(capsys, evaluate.main, arguments)
    arguments = ["judge", f"--data={data}", f"--out={data / 'judge.safetensors'}"]
    assert "is in the folder of the data. Choose another one" in refusal_of(capsys, train_classifiers.main, arguments)


def test_note_says_that_the_checkpoint_started_from_one_of_other_pictures(
    folder: Path, data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    draws(monkeypatch, of_each_class(data, "test", [0, 1, 2]))
    loaded = checkpoint.load(folder / "tiny.safetensors")
    learned = {"data": data.description, "earlier_data": ["colours, 5 training images, SHA-256 0"]}
    checkpoint.save(tmp_path / "a", loaded.network, replace(loaded.config, training={"label_drop": 0.1, **learned}))
    run(folder, tmp_path / "out", "--num-images=60", f"--checkpoint={tmp_path / 'a'}")
    assert "note: the checkpoint was not trained with exactly the pictures of --data" in capsys.readouterr().out


@pytest.mark.parametrize("is_the_same", [True, False])
def test_note_says_that_the_checkpoint_learned_from_other_pictures(
    folder: Path, data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, is_the_same: bool
) -> None:
    draws(monkeypatch, of_each_class(data, "test", [0, 1, 2]))
    loaded = checkpoint.load(folder / "tiny.safetensors")
    learned = data.description.replace("colours", "moved") if is_the_same else "colours, 5 training images, SHA-256 0"
    config = replace(loaded.config, training={"label_drop": 0.1, "data": learned})
    checkpoint.save(tmp_path / "other.safetensors", loaded.network, config)
    run(folder, tmp_path / "out", "--num-images=60", f"--checkpoint={tmp_path / 'other.safetensors'}")
    assert (
        "note: the checkpoint was not trained with exactly the pictures of --data" in capsys.readouterr().out
    ) is not is_the_same
