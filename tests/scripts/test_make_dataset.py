import io
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn
from torchvision.datasets.mnist import read_image_file, read_label_file

from model import checkpoint
from model.pixels import to_pixels
from model.sampler import Guidance
from scripts import make_dataset
from scripts.common import drawing
from scripts.common.drawing import Drawer, DrawingOptions
from scripts.common.progress import Reporter
from scripts.evaluation import dataset
from scripts.evaluation.classifiers import DIGITS_SHAPE, Classifier, Trained
from scripts.evaluation.parquet import FILE, find_parquet, read_parquet
from tests.scripts.tiny_checkpoint import save_tiny_checkpoint

COUNT = 25
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Returns a function that makes a small data set with ten images per part."""
    monkeypatch.setattr(dataset, "PART", 10)
    tiny = save_tiny_checkpoint(tmp_path / "tiny.safetensors")

    def run(name: str, *more: str, count: int | None = COUNT) -> Path:
        out = tmp_path / name
        numbers = [] if count is None else [f"--count={count}"]
        drawing = [f"--checkpoint={tiny}", "--num-steps=2", "--sampler=ddim", "--seed=3"]
        make_dataset.main([f"--out={out}", *numbers, *drawing, *more])
        return out

    return run


class FakeJudge(Classifier):
    """Gives each digit 0.1 for images with an even sum of pixels, and digit 0 almost 1 for the others."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(), 0, DIGITS_SHAPE)
        self.head = nn.Linear(1, 10, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([20.0, *[0.0] * 9])[:, None])

    def features(self, x: Tensor) -> Tensor:
        return ((x * 255).round().sum(dim=(1, 2, 3)) % 2)[:, None]


@pytest.fixture
def fake_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Trained(FakeJudge().eval(), {"test_accuracy": 0.5}, "0123abcd")
    monkeypatch.setattr(dataset, "load_classifier", lambda kind: trained)


def draw(tmp_path: Path, labels: list[int], index: list[int]) -> np.ndarray:
    """Generates images (N, 28, 28) without make_dataset, with the options of `make`."""
    drawer = Drawer(checkpoint.load(tmp_path / "tiny.safetensors"))
    options = DrawingOptions("ddim", 2, Guidance(1.5, start=2, stop=8))
    with Reporter() as reporter:
        x_0 = drawer.draw(torch.tensor(labels), torch.tensor(index), options, reporter, seed=3)
    return to_pixels(x_0)[:, 0].numpy()


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Reads the Parquet file with pyarrow only."""
    rows: list[dict[str, Any]] = pq.read_table(folder / FILE).to_pylist()
    return rows


def pixels_of(rows: list[dict[str, Any]]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in rows])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_idx_files_have_the_images_of_the_checkpoint(make: Make, tmp_path: Path) -> None:
    out = make("set")
    images = read_image_file(str(out / "train-images-idx3-ubyte"))
    labels = read_label_file(str(out / "train-labels-idx1-ubyte"))
    assert labels.tolist() == [i % 10 for i in range(COUNT)]
    assert set(files(out)) == {"train-images-idx3-ubyte", "train-labels-idx1-ubyte", "dataset.json", "README.md"}
    assert np.array_equal(images.numpy(), draw(tmp_path, labels.tolist(), list(range(COUNT))))


def test_png_folders_have_the_same_images_as_idx_files(make: Make) -> None:
    images, folder = read_image_file(str(make("set") / "train-images-idx3-ubyte")), make("png", "--format=png")
    for i, image in enumerate(images):
        with Image.open(folder / str(i % 10) / f"{i // 10:05d}.png") as png:
            assert np.array_equal(np.asarray(png), image.numpy())
    assert len(files(folder)) == COUNT + 2


@pytest.mark.parametrize("where", ["drawing", "writing"])
def test_stopped_data_set_continues_and_is_the_same(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    whole, calls = files(make("whole")), iter(range(100))
    draw = Drawer.draw

    def draw_or_stop(*args: Any, **options: Any) -> Any:
        if where == "drawing" and next(calls) == 1:
            raise KeyboardInterrupt
        return draw(*args, **options)

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Drawer, "draw", draw_or_stop)
        if where == "writing":
            patch.setattr(dataset, "write_idx", stop)
        with pytest.raises(SystemExit) as exit_:
            make("stopped")
        assert exit_.value.code == 130
    parts = sorted(path.name for path in (tmp_path / "stopped" / "parts").iterdir())
    assert parts == ["0000000", "0000010", "0000020"][: 1 if where == "drawing" else 3]
    assert files(make("stopped")) == whole


def test_finished_data_set_is_kept_and_other_arguments_are_rejected(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = make("set")
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    make("set")
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "other.txt").write_text("text")
    capsys.readouterr()
    for name, more in (("set", ["--seed=4"]), ("set", ["--format=png"]), ("mine", [])):
        with pytest.raises(SystemExit) as exit_:
            make(name, *more)
        assert exit_.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert json.loads((out / "dataset.json").read_text())["seed"] == 3
    (out / "dataset.json").write_text('{"seed": 3')
    with pytest.raises(SystemExit):
        make("set")
    assert "is damaged" in capsys.readouterr().err


def test_auto_continues_a_data_set_in_its_own_compile_mode(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = files(make("whole", "--compile=off"))
    monkeypatch.setattr(drawing, "compiled_step", lambda *_: pytest.fail("compiled"))
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "write_idx", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            make("stopped", "--compile=off")
    assert files(make("stopped", "--compile=auto")) == whole
    monkeypatch.setattr(drawing, "compiled_step", lambda program, cache: program)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        make("stopped", "--compile=on")
    assert "has a data set with compiled = False, but this run has True" in capsys.readouterr().err


def test_folder_with_other_content_is_rejected_before_compiling(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "compiled_step", lambda *_: pytest.fail("compiled"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "other.txt").write_text("text")
    with pytest.raises(SystemExit):
        make("mine", "--compile")


def test_run_that_was_killed_while_it_wrote_its_first_file_starts_again(make: Make, tmp_path: Path) -> None:
    (tmp_path / "killed" / "parts").mkdir(parents=True)
    (tmp_path / "killed" / f".{dataset.FACTS}.x1y2z3").write_text("{")  # the name of write_atomically's temporary file
    assert (make("killed") / "train-images-idx3-ubyte").exists()


def test_parquet_has_the_same_images_as_idx_files(make: Make) -> None:
    folder, rows = make("set"), read_rows(make("parquet", "--format=parquet"))
    assert np.array_equal(pixels_of(rows), read_image_file(str(folder / "train-images-idx3-ubyte")).numpy())
    assert [row["label"] for row in rows] == read_label_file(str(folder / "train-labels-idx1-ubyte")).tolist()
    assert [(row["seed"], row["index"]) for row in rows] == [(3, i) for i in range(COUNT)]


@pytest.mark.parametrize(("option", "extra"), [("--format=parquet", "parquet"), ("--engine=ray", "ray-data")])
def test_missing_package_gives_the_line_that_installs_it(
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
    extra: str,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit_:
        make("set", option)
    assert exit_.value.code == 2
    assert f"pip install -e '.[{extra}]'" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_ray_is_imported_only_for_its_engine() -> None:
    program = "import sys, scripts.make_dataset; sys.exit('ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("form", ["idx", "png", "parquet"])
def test_balance_gives_each_digit_its_number_of_images(make: Make, form: str) -> None:
    out = make(form, "--balance=0=2,1=5,7=20,8=0", f"--format={form}", count=None)
    match form:
        case "idx":
            labels = read_label_file(str(out / "train-labels-idx1-ubyte")).tolist()
        case "png":
            labels = [int(path.parent.name) for path in out.rglob("*.png")]
        case _:
            labels = read_parquet(find_parquet(out))[1].tolist()
    assert [labels.count(digit) for digit in range(10)] == [2, 5, 0, 0, 0, 0, 0, 20, 0, 0]


def test_balance_mixes_the_digits_and_keeps_their_shares_in_each_part(make: Make) -> None:
    labels = read_label_file(str(make("set", "--balance=3=10,4=40", count=None) / "train-labels-idx1-ubyte")).tolist()
    assert [labels[start : start + 10].count(3) for start in range(0, 50, 10)] == [2] * 5


def test_equal_balance_gives_the_same_files_as_count(make: Make) -> None:
    equal = ",".join(f"{digit}=2" for digit in range(10))
    assert files(make("balance", f"--balance={equal}", count=None)) == files(make("count", count=20))


@pytest.mark.parametrize("form", ["idx", "parquet"])
def test_data_set_can_have_one_image(make: Make, form: str) -> None:
    out = make("set", f"--format={form}", count=1)
    assert "1 image of 28x28" in (out / "README.md").read_text()
    if form == "parquet":
        assert [row["label"] for row in read_rows(out)] == [0]
    else:
        assert read_image_file(str(out / "train-images-idx3-ubyte")).shape == (1, 28, 28)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--balance=10=5"], "not a list of different digits"),
        (["--balance=1=5,1=6"], "not a list of different digits"),
        (["--balance=1=-5"], "not a list of different digits"),
        (["--balance=1:5"], "not a list of different digits"),
        (["--balance=1=0"], "has 0 images"),
        (["--balance=1=600000,2=600000"], "has 1200000 images"),
        (["--balance=1=5", "--count=5"], "not allowed with"),
        (["--min-confidence=1"], "not a number above 0 and below 1"),
        (["--min-confidence=nan"], "not a number above 0"),
        (["--workers=2"], "--ray-address and --workers need --engine ray"),
        (["--ray-address=127.0.0.1:1"], "--ray-address and --workers need --engine ray"),
        (["--engine=ray", "--workers=0"], "not an integer from 1"),
    ],
)
def test_wrong_argument_gives_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        make_dataset.main([f"--out={tmp_path / 'set'}", *arguments])
    assert exit_.value.code == 2
    assert reason in capsys.readouterr().err


def test_filter_replaces_dropped_images_by_further_noise(make: Make, tmp_path: Path, fake_judge: None) -> None:
    rows = read_rows(make("set", "--format=parquet", "--min-confidence=0.05"))
    labels, index = [row["label"] for row in rows], [row["index"] for row in rows]
    images = pixels_of(rows)
    assert labels == [i % 10 for i in range(COUNT)]
    assert np.array_equal(images, draw(tmp_path, labels, index))
    odd = images.astype(int).sum(axis=(1, 2)) % 2 == 1
    assert set(np.array(labels)[odd]) <= {0}
    confidence = [1.0 if is_odd else 0.1 for is_odd in odd]
    assert [row["confidence"] for row in rows] == pytest.approx(confidence, abs=1e-6)
    facts = json.loads((tmp_path / "set" / "dataset.json").read_text())
    total = COUNT + sum(facts["num_dropped"])
    assert len(set(index)) == COUNT < total
    assert facts["num_dropped"][0] == 0
    assert max(index) == total - 1
    assert (facts["min_confidence"], facts["judge_sha256"]) == (0.05, "0123abcd")


def test_filter_that_keeps_every_image_changes_no_image(make: Make, fake_judge: None) -> None:
    assert (
        files(make("filtered", "--min-confidence=1e-12"))["train-images-idx3-ubyte"]
        == (files(make("set"))["train-images-idx3-ubyte"])
    )


def test_filter_that_keeps_almost_nothing_ends_with_an_error(
    make: Make, tmp_path: Path, fake_judge: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dataset, "FEWEST_DRAWN", 20)
    for _ in range(2):  # the second run continues, and ends with the same error
        with pytest.raises(SystemExit) as exit_:
            make("set", "--balance=0=5,4=5", "--min-confidence=0.5", count=None)
        assert exit_.value.code == 2
        err = capsys.readouterr().err
        assert "it kept 0 of 20 images of digit 4, less than 1%" in err
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize("stop_after", [1, 3])
@pytest.mark.parametrize("form", ["idx", "png", "parquet"])
def test_stopped_filtered_data_set_continues_and_is_the_same(
    make: Make, fake_judge: None, monkeypatch: pytest.MonkeyPatch, form: str, stop_after: int
) -> None:
    given = ["--balance=0=4,5=16,6=5", "--min-confidence=0.05", f"--format={form}"]
    whole, calls, draw_all = files(make("whole", *given, count=None)), iter(range(100)), Drawer.draw

    def draw_or_stop(*args: Any, **options: Any) -> Any:
        if next(calls) == stop_after:
            raise KeyboardInterrupt
        return draw_all(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Drawer, "draw", draw_or_stop)
        with pytest.raises(SystemExit):
            make("stopped", *given, count=None)
    assert files(make("stopped", *given, count=None)) == whole


def test_data_set_with_another_filter_or_balance_is_rejected(
    make: Make, fake_judge: None, capsys: pytest.CaptureFixture[str]
) -> None:
    make("set", "--min-confidence=0.05")
    for more, count, name in (
        (["--min-confidence=0.06"], COUNT, "min_confidence = 0.05"),
        ([], COUNT, "judge_sha256 = '0123abcd'"),
        (["--min-confidence=0.05", "--balance=0=25"], None, "num_images = [3, 3, 3, 3, 3, 2, 2, 2, 2, 2]"),
    ):
        with pytest.raises(SystemExit):
            make("set", *more, count=count)
        assert f"has a data set with {name}" in capsys.readouterr().err


def test_unfinished_data_set_of_an_earlier_release_continues(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Facts of earlier releases have no numbers per digit and fewer options. The parts are the same."""
    whole = files(make("whole"))
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "write_idx", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            make("old")
    path = tmp_path / "old" / "dataset.json"
    facts = json.loads(path.read_text())
    del facts["num_images"]
    path.write_text(json.dumps(facts))
    (tmp_path / "old" / "parts" / "0000020").unlink()
    assert files(make("old")) == whole


def test_damaged_part_gives_an_error_that_names_it(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "write_idx", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            make("set")
    (tmp_path / "set" / "parts" / "0000010").write_bytes(b"pixels")
    with pytest.raises(SystemExit):
        make("set")
    assert "0000010 is damaged. Delete it" in capsys.readouterr().err


def test_card_states_the_arguments_and_the_true_numbers(make: Make, tmp_path: Path, fake_judge: None) -> None:
    out = make("set", "--balance=0=4,5=16", "--min-confidence=0.05", "--format=parquet", count=None)
    text, rows = (out / "README.md").read_text(), read_rows(out)
    dropped = max(row["index"] for row in rows) + 1 - len(rows)
    assert dropped > 0
    assert f"| 5 | 16 | {dropped} | {dropped / (16 + dropped):.2%} |" in text
    assert "| 0 | 4 | 0 | 0.00% |" in text
    assert "| 1 | 0 | 0 | - |" in text
    assert f"| all | 20 | {dropped} | {dropped / (20 + dropped):.2%} |" in text
    loaded = checkpoint.load(tmp_path / "tiny.safetensors")
    for stated in (
        *(loaded.sha256, loaded.weights_sha256, "0123abcd", "at least 0.05", "reduces the diversity"),
        *("| sampler | `ddim` |", "| steps | 2 |", "scale 1.5 at t = 2 to 8", "| seed | 3 |"),
    ):
        assert stated in text
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["size_categories"] == ["n<1K"]
    assert front["configs"] == [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}]
    features = front["dataset_info"]["features"]
    assert [feature["name"] for feature in features] == list(rows[0])
    assert features[1]["dtype"] == {"class_label": {"names": {str(digit): str(digit) for digit in range(10)}}}


def test_command_in_the_card_makes_the_same_files(
    make: Make, tmp_path: Path, fake_judge: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = make("set", "--balance=0=4,5=6", "--min-confidence=0.05", "--guidance-scale=2.5", count=None)
    (line,) = (line for line in (out / "README.md").read_text().splitlines() if line.startswith("python -m"))
    monkeypatch.chdir(tmp_path)
    make_dataset.main(shlex.split(line)[3:])
    assert files(tmp_path / "out" / "set") == files(out)


@pytest.mark.parametrize("form", ["idx", "png"])
def test_card_of_other_formats_has_no_configuration_and_no_filter(make: Make, form: str) -> None:
    text = (make("set", f"--format={form}") / "README.md").read_text()
    assert set(yaml.safe_load(text.split("---\n")[1])) == {"pretty_name", "task_categories", "size_categories", "tags"}
    assert "| 4 | 3 |" in text
    assert "| 5 | 2 |" in text
    assert "filter" not in text.lower()
