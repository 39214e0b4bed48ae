"""The scripts in an installation that has only the packages of the service."""

import importlib
from pathlib import Path

import pytest
from PIL import Image

from model.sampler import Guidance
from tests.scripts.extras import EXTRAS, hide
from tests.scripts.tiny_checkpoint import save_tiny_checkpoint


@pytest.fixture(autouse=True)
def without_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in EXTRAS:
        hide(package, monkeypatch)


@pytest.fixture
def unguided(tmp_path: Path) -> Path:
    """A checkpoint with 10 timesteps, without guidance."""
    return save_tiny_checkpoint(tmp_path / "unguided.safetensors", label_drop=0, guidance=Guidance())


def test_sample_needs_no_extra(unguided: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = importlib.import_module("scripts.sample")
    out = tmp_path / "seven.png"
    sample.main(["--digit=7", f"--checkpoint={unguided}", f"--out={out}", "--num-steps=1", "--seed=5"])
    assert capsys.readouterr().out == f"wrote 1 image with seed 5: {out}\n"
    with Image.open(out) as image:
        assert image.size == (28, 28)


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("sample --digit=11 --out=x.png", "--label 11"),
        ("sample --digit=1 --out=x.jpg", "--out x.jpg"),
        ("sample --digit=11 --out=x.png --clip-guidance-scale=1", "--label 11"),
        ("sample --digit=1 --out=x.png --clip-prompt=seven", "--clip-prompt needs"),
        ("sample --digit=1 --out=x.png --num-steps=11", "10 timesteps"),
        ("train --preset=nonsense --out=x", "unknown preset 'nonsense'"),
        ("distil --preset=default --out=x", "[distillation]"),
        ("train_clip --epochs=0", "--epochs"),
        ("train_classifiers critic", "critic"),
        ("plot losses", "--out"),
        ("plot noise --out=x.png --num-steps=11", "10 timesteps"),
        ("plot noise --out=x.png --data-dir=data --sampler=ddim", "--sampler has no effect with --data-dir"),
        ("plot guidance --out=x.png", "does not support guidance"),
        ("plot reverse --out=x.png --checkpoint=nowhere", "nowhere cannot be read"),
        ("evaluate digits --split=none", "--split"),
        ("evaluate digits --guidance-scale=2", "does not support guidance"),
        ("evaluate digits --images=x --sampler=ddim", "--sampler has no effect on existing images"),
        ("evaluate fog --out=x.png --checkpoint=nowhere", "nowhere cannot be read"),
        ("evaluate recognize --out=x.png --checkpoint=nowhere", "nowhere cannot be read"),
        ("evaluate inpaint --out=x.png --num-steps=11", "10 timesteps"),
        ("evaluate clip --out=x.png --num-steps=11", "10 timesteps"),
        ("evaluate clip-guidance --out=x.png --intervals 2-11", "An interval ends at 11"),
        ("evaluate clip-attributes --out=x.png --clip-guidance-scale=0", "--clip-guidance-scale must be above 0"),
        ("compare steps --out=x --steps=11", "does not permit 11 steps"),
        ("compare guidance --out=x", "does not support guidance"),
        ("make_dataset --out=x --format=parquet --num-steps=11", "10 timesteps"),
        ("bench closed", "--out"),
        ("bench", "either --quick or one mode"),
        ("collect http://127.0.0.1:1 --out=x --num-images=7", "--num-images"),
        ("ship nowhere", "nowhere cannot be read"),
    ],
)
def test_wrong_argument_is_reported_before_a_missing_extra(
    unguided: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    name, *arguments = command.split()
    monkeypatch.setattr("scripts.common.arguments.SHIPPED", unguided)
    with pytest.raises(SystemExit) as exit_:
        importlib.import_module(f"scripts.{name}").main(arguments)
    assert exit_.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert reason in sentence
    assert not (tmp_path / "x").exists()
