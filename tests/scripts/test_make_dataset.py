import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets.mnist import read_image_file, read_label_file

from model import checkpoint
from model.sampler import Guidance
from scripts import make_dataset
from scripts.common import drawing
from scripts.common.drawing import Drawer, DrawingOptions
from scripts.common.progress import Reporter
from scripts.evaluation import dataset
from tests.scripts.tiny_checkpoint import save_tiny_checkpoint

COUNT = 25
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Returns a function that makes a small data set with ten images per part."""
    monkeypatch.setattr(dataset, "PART", 10)
    tiny = save_tiny_checkpoint(tmp_path / "tiny.safetensors")

    def run(name: str, *more: str, count: int = COUNT) -> Path:
        out = tmp_path / name
        drawing = [f"--checkpoint={tiny}", "--num-steps=2", "--sampler=ddim", "--seed=3"]
        make_dataset.main([f"--out={out}", f"--count={count}", *drawing, *more])
        return out

    return run


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_idx_files_have_the_images_of_the_checkpoint(make: Make, tmp_path: Path) -> None:
    out = make("set")
    images = read_image_file(str(out / "train-images-idx3-ubyte"))
    labels = read_label_file(str(out / "train-labels-idx1-ubyte"))
    assert labels.tolist() == [i % 10 for i in range(COUNT)]
    assert set(files(out)) == {"train-images-idx3-ubyte", "train-labels-idx1-ubyte", "dataset.json"}
    drawer = Drawer(checkpoint.load(tmp_path / "tiny.safetensors"))
    index = torch.arange(COUNT)
    with Reporter() as reporter:
        options = DrawingOptions("ddim", 2, Guidance(1.5, start=2, stop=8))
        x_0 = drawer.draw(index % 10, index, options, reporter, seed=3)
    expected = (x_0[:, 0] + 1) * 127.5
    assert (images.float() - expected).abs().max() <= 0.51


def test_png_folders_have_the_same_images_as_idx_files(make: Make) -> None:
    images, folder = read_image_file(str(make("set") / "train-images-idx3-ubyte")), make("png", "--format=png")
    for i, image in enumerate(images):
        with Image.open(folder / str(i % 10) / f"{i // 10:05d}.png") as png:
            assert np.array_equal(np.asarray(png), image.numpy())
    assert len(files(folder)) == COUNT + 1


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
