import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import checkpoint
from model.checkpoint import CheckpointConfig, Probe
from model.clip import EMBEDDED, Clip
from model.compiled.compiler import library_of
from model.png import encode_png
from model.precision import fast_dtype
from model.prompts import digit_prompt
from model.sampler import Guidance
from model.schedule import ScheduleConfig
from model.spec import SHIPPED, SHIPPED_FAST
from model.step import ReverseStep
from scripts import sample
from scripts.common import drawing
from tests.model.tiny_checkpoint import tiny_checkpoint
from tests.scripts.tiny_checkpoint import save_tiny_checkpoint
from tests.tiny import COMPILED, tiny_unet


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny.safetensors")


def pixels(path: Path) -> Tensor:
    with Image.open(path) as image:
        return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width)


def draw(tiny: Path, out: Path, *arguments: str) -> None:
    sample.main(["--checkpoint", str(tiny), "--out", str(out), "--num-steps", "2", "--seed", "5", *arguments])


def test_one_digit_is_arranged_in_a_square_and_empty_cells_are_black(tiny: Path, tmp_path: Path) -> None:
    draw(tiny, tmp_path / "a.png", "--digit", "7", "--count", "5")
    sheet = pixels(tmp_path / "a.png")
    assert sheet.shape == (2 * 28, 3 * 28)
    assert not sheet[28:, 56:].any()
    assert all(cell.any() for cell in (sheet[:28, :28], sheet[28:, 28:56]))


def test_several_digits_get_one_row_each(tiny: Path, tmp_path: Path) -> None:
    draw(tiny, tmp_path / "two.png", "--digit", "7", "--digit", "2", "--count", "3")
    draw(tiny, tmp_path / "two", "--digit", "2", "--count", "3")
    sheet = pixels(tmp_path / "two.png")
    assert sheet.shape == (2 * 28, 3 * 28)
    for i in range(3):
        alone = pixels(tmp_path / "two" / f"digit-2-seed-5-{i}.png").int()
        cell = sheet[28:, 28 * i : 28 * (i + 1)].int()
        assert (alone - cell).abs().float().mean() < 2  # another batch size may round differently


def test_all_means_every_digit_once(tiny: Path, tmp_path: Path) -> None:
    draw(tiny, tmp_path / "all", "--digit", "all", "--digit", "3")
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == [f"digit-{d}-seed-5-0.png" for d in range(10)]


def test_png_contains_its_provenance(tiny: Path, tmp_path: Path) -> None:
    draw(tiny, tmp_path / "out", "--digit", "4", "--count", "2", "--sampler", "ddim", "--guidance-scale", "2.5")
    with Image.open(tmp_path / "out" / "digit-4-seed-5-1.png") as image:
        text = image.text  # type: ignore[attr-defined]
    facts = {"Digit": "4", "Seed": "5", "Index": "1", "Sampler": "ddim", "Steps": "2", "Guidance-Scale": "2.5"}
    assert {name: text[name] for name in facts} == facts
    assert text["Software"].startswith("unfog ") and len(text["Model-SHA256"]) == 64


def test_scale_enlarges_by_an_integer_factor(tiny: Path, tmp_path: Path) -> None:
    draw(tiny, tmp_path / "small.png", "--digit", "1")
    draw(tiny, tmp_path / "large.png", "--digit", "1", "--scale", "3")
    small, large = pixels(tmp_path / "small.png"), pixels(tmp_path / "large.png")
    assert torch.equal(large, small.repeat_interleave(3, 0).repeat_interleave(3, 1))


def test_same_seed_gives_the_same_file_and_another_seed_does_not(tiny: Path, tmp_path: Path) -> None:
    for name, seed in (("a.png", "1"), ("b.png", "1"), ("c.png", "2")):
        draw(tiny, tmp_path / name, "--digit", "all", "--seed", seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert a == b != c


def test_without_a_seed_a_random_seed_is_used_and_printed(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", str(tiny), "--num-steps", "1", "--digit", "1", "--out"]
    sample.main([*arguments, str(tmp_path / "a")])
    sample.main([*arguments, str(tmp_path / "b")])
    a, b = next((tmp_path / "a").iterdir()), next((tmp_path / "b").iterdir())
    assert a.name != b.name
    told = [line.split("seed ")[1].split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert [a.name, b.name] == [f"digit-1-seed-{seed}-0.png" for seed in told]


@pytest.mark.parametrize(
    "wrong",
    [
        ["--digit", "11"],
        ["--digit", "seven"],
        ["--digit", "1", "--count", "0"],
        ["--digit", "1", "--num-steps", "11"],
        ["--digit", "1", "--seed", "-1"],
        ["--digit", "1", "--seed", str(2**53)],
        ["--digit", "1", "--seed", "9" * 10_000],
        ["--digit", "1", "--guidance-scale", "nan"],
        ["--digit", "1", "--guidance-scale", "0.5"],
        ["--digit", "1", "--clip-guidance-scale", "11"],
        ["--digit", "1", "--clip-prompt", "a seven"],
        ["--digit", "1", "--clip-guidance-scale", "1", "--clip-model", "nowhere"],
        ["--digit", "1", "--sampler", "euler"],
        ["--digit", "1", "--checkpoint", "nowhere.safetensors"],
        ["--digit", "1", "--colour", "red"],
        ["--digit", "1", "--out", "picture.jpg"],
        [],
    ],
    ids=lambda wrong: " ".join(wrong)[:40] or "nothing",
)
def test_wrong_argument_exits_with_status_2_and_one_line(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: list[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        sample.main(["--checkpoint", str(tiny), "--out", str(tmp_path / "x.png"), *wrong])
    assert exit_.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_guidance_is_rejected_if_the_checkpoint_does_not_support_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = save_tiny_checkpoint(tmp_path / "plain.safetensors", label_drop=0, guidance=Guidance())
    with pytest.raises(SystemExit) as exit_:
        draw(plain, tmp_path / "x.png", "--digit", "1", "--guidance-scale", "1.3")
    assert exit_.value.code == 2
    assert "does not support guidance" in capsys.readouterr().err
    draw(plain, tmp_path / "x.png", "--digit", "1", "--guidance-scale", "1")
    assert (tmp_path / "x.png").exists()


def sample_process(tiny: Path, out: Path, cache: Path, *arguments: str, **variables: str) -> tuple[int, str, str]:
    """Runs `python -m scripts.sample` on a CPU. Returns exit status, stdout and stderr."""
    command = [sys.executable, "-m", "scripts.sample", f"--checkpoint={tiny}", f"--out={out}", *arguments]
    own = {"UNFOG_CACHE_DIR": str(cache), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    options = ["--digit=7", "--num-steps=2", "--seed=5"]
    ended = subprocess.run([*command, *options], env=os.environ | own | variables, capture_output=True, text=True)
    return ended.returncode, ended.stdout, ended.stderr


def test_without_a_compiler_auto_runs_uncompiled_and_on_fails(tiny: Path, tmp_path: Path) -> None:
    out, cache = tmp_path / "x.png", tmp_path / "cache"
    status, said, failed = sample_process(tiny, out, cache, "--compile", CXX="no-such-compiler")
    assert (status, said) == (2, "")
    assert failed.startswith("sample: --compile on: compiling needs a C++ compiler")
    assert len(failed.splitlines()) == 1
    assert not out.exists()
    status, said, failed = sample_process(tiny, out, cache, CXX="no-such-compiler")
    assert (status, failed) == (0, "")
    slow, drawn = said.splitlines()
    assert "not compiled, so generating images is slower: compiling needs a C++ compiler" in slow
    assert drawn == f"wrote 1 image with seed 5: {out}"
    assert out.exists()


@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs g++")
@pytest.mark.slow  # it compiles for 50 s
def test_second_run_uses_the_compiled_step_of_the_first_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny, cache, first = tiny_checkpoint(tmp_path, **COMPILED), tmp_path / "cache", tmp_path / "first.png"
    monkeypatch.setenv("UNFOG_CACHE_DIR", str(cache))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sample.main([f"--checkpoint={tiny}", f"--out={first}", "--digit=7", "--num-steps=2", "--seed=5", "--compile"])
    assert "compil" in capsys.readouterr().out.splitlines()[0].lower()
    cpu = torch.device("cpu")
    assert library_of(ReverseStep(checkpoint.load(tiny), cpu, fast_dtype(cpu)), cache).exists()
    status, said, failed = sample_process(tiny, tmp_path / "second.png", cache, CXX="no-such-compiler")
    assert (status, failed) == (0, "")
    assert said.splitlines() == [f"wrote 1 image with seed 5: {tmp_path / 'second.png'}"]
    assert (tmp_path / "second.png").read_bytes() == (tmp_path / "first.png").read_bytes()


@pytest.mark.parametrize("wrong", [["--digit=11"], ["--digit=1", "--num-steps=11"], ["--digit=1", "--guidance-stop=1"]])
def test_wrong_argument_is_reported_before_compilation(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: list[str]
) -> None:
    monkeypatch.setattr(drawing, "compiled_step", lambda *_: pytest.fail("compiled"))
    with pytest.raises(SystemExit) as exit_:
        sample.main(["--checkpoint", str(tiny), "--out", str(tmp_path / "x.png"), "--compile", *wrong])
    assert exit_.value.code == 2


def like(picture: Path, *arguments: str) -> int:
    """Generates a picture again. Returns the exit status."""
    try:
        sample.main(["--like", str(picture), *arguments])
    except SystemExit as exit_:
        assert isinstance(exit_.code, int)
        return exit_.code
    return 0


def alter(path: Path, *, pixels: int = 0, amount: int = 1, **chunks: str) -> Path:
    """Writes a copy with other values of the first pixels and with other text chunks. Returns its path."""
    with Image.open(path) as image:
        altered, text = np.array(image), {**image.text}  # type: ignore[attr-defined]
    altered.ravel()[:pixels] ^= amount
    text |= {name.replace("_", "-"): value for name, value in chunks.items()}
    copy = path.with_name(f"altered-{path.name}")
    copy.write_bytes(encode_png(Image.fromarray(altered), text=text))
    return copy


@pytest.mark.parametrize(
    "arguments",
    [
        ["--digit", "7"],
        ["--digit", "7", "--count", "5", "--scale", "3"],
        ["--digit", "7", "--digit", "2", "--count", "3"],
        ["--digit", "all", "--sampler", "ddim", "--guidance-scale", "2.5", "--scale", "2"],
    ],
    ids=" ".join,
)
def test_picture_is_generated_again_with_the_same_bytes(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    picture, again = tmp_path / "picture.png", tmp_path / "again.png"
    draw(tiny, picture, *arguments)
    capsys.readouterr()
    assert like(picture, "--checkpoint", str(tiny), "--out", str(again)) == 0
    assert capsys.readouterr().out == f"{picture} is identical\n"
    assert again.read_bytes() == picture.read_bytes()


def test_single_image_is_generated_again_with_its_index(tiny: Path, tmp_path: Path) -> None:
    draw(tiny, tmp_path / "out", "--digit", "4", "--count", "3", "--sampler", "ddpm")
    for index in range(3):
        picture = tmp_path / "out" / f"digit-4-seed-5-{index}.png"
        assert like(picture, "--checkpoint", str(tiny), "--out", str(tmp_path / "again.png")) == 0
        assert (tmp_path / "again.png").read_bytes() == picture.read_bytes()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pixels": 3}, "3 of 784 pixels differ, by at most 1 grey level. Mostly small differences mean"),
        ({"pixels": 784, "amount": 128}, "784 of 784 pixels differ, by at most 128 grey levels. Mostly small"),
        (
            {"pixels": 1, "Software": "unfog 0.0.1"},
            "1 grey level. It was generated by another release: unfog 0.0.1. This release is",
        ),
        ({"Seed": "6"}, "pixels differ, by at most "),
        ({"Index": "1"}, "pixels differ, by at most "),
    ],
    ids=str,
)
def test_altered_picture_is_described_with_status_1(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, Any], message: str
) -> None:
    draw(tiny, tmp_path / "x.png", "--digit", "7")
    picture = alter(tmp_path / "x.png", **changed)
    assert like(picture, "--checkpoint", str(tiny)) == 1
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(f"{picture} is not identical: ")
    assert message in said


def test_picture_of_a_shipped_checkpoint_needs_no_checkpoint_argument(tmp_path: Path) -> None:
    options = ["--digit", "7", "--seed", "1"]
    sample.main(["--checkpoint", str(SHIPPED_FAST), *options, "--out", str(tmp_path / "fast.png")])
    assert like(tmp_path / "fast.png") == 0


def test_size_of_a_picture_is_limited_without_a_warning(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow warns above its limit, and refuses a picture above twice the limit."""
    draw(tiny, tmp_path / "x.png", "--digit", "7")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 28 * 28 - 1)
    assert like(tmp_path / "x.png", "--checkpoint", str(tiny)) == 0
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 28 * 28 // 3)
    capsys.readouterr()
    assert like(tmp_path / "x.png", "--checkpoint", str(tiny)) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "has too many pixels" in said


def other_file(folder: Path, name: str) -> Path:
    """Writes a file that --like refuses, and returns its path."""
    path, picture = folder / name, Image.new("L", (28, 28))
    if name == "text.png":
        path.write_text("hello")
    elif name == "plain.png":
        path.write_bytes(encode_png(picture))
    elif name == "photo.png":
        picture.save(path, "JPEG")
    return path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.png", "No such file"),
        ("text.png", "is not a PNG file, or is damaged"),
        ("photo.png", "is not a PNG file, or is damaged"),
        ("plain.png", "has no text chunk Software"),
    ],
)
def test_file_without_provenance_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    path = other_file(tmp_path, name)
    assert like(path) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert message in said


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"Task": "denoise"}, "was made from another picture"),
        ({"Steps": "1e9"}, "The text chunk Steps must be an integer"),
        ({"Steps": "11"}, "this checkpoint has 10 timesteps"),
        ({"Index": "0-8"}, "has 28 x 28 pixels. Its checkpoint generates 84 x 84 pixels"),
        ({"Index": "0-999999999"}, "The text chunk Index must be"),
        ({"Digit": "7,2", "Label": '["7", "2"]'}, "generates 28 x 56 pixels"),
    ],
    ids=str,
)
def test_picture_that_cannot_be_generated_again_is_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, str], message: str
) -> None:
    draw(tiny, tmp_path / "x.png", "--digit", "7")
    capsys.readouterr()
    assert like(alter(tmp_path / "x.png", **changed), "--checkpoint", str(tiny)) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert message in said


@pytest.mark.parametrize("given", [[], ["--checkpoint"]], ids=["shipped", "given"])
def test_picture_of_another_checkpoint_is_refused_with_both_digests(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str]
) -> None:
    draw(tiny, tmp_path / "x.png", "--digit", "7")
    other = save_tiny_checkpoint(tmp_path / "other.safetensors", label_drop=0.2)
    capsys.readouterr()
    assert like(tmp_path / "x.png", *given, *([str(other)] if given else [])) == 2
    (said,) = capsys.readouterr().err.splitlines()
    for path in [tiny, *([other] if given else [SHIPPED, SHIPPED_FAST])]:
        assert hashlib.sha256(path.read_bytes()).hexdigest() in said


@pytest.mark.parametrize(
    "wrong",
    [
        ["--label", "7"],
        ["--count", "1"],
        ["--scale", "1"],
        ["--seed", "5"],
        ["--sampler", "ddpm"],
        ["--num-steps", "2"],
        ["--guidance-scale", "1"],
        ["--guidance-start", "2"],
        ["--clip-guidance-scale", "0"],
        ["--clip-prompt", "a seven"],
        ["--out", "picture.jpg"],
        ["--out", "folder"],
    ],
    ids=" ".join,
)
def test_option_that_the_picture_determines_is_refused_with_like(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: list[str]
) -> None:
    assert like(tmp_path / "x.png", "--checkpoint", str(tiny), *wrong) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"sample: {wrong[0]} ")


@pytest.fixture(scope="module")
def with_clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Returns a checkpoint with 100 timesteps, and a folder of pictures with CLIP guidance at t = 50."""
    pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("clip")
    path = save_tiny_checkpoint(folder / "tiny.safetensors", num_steps=100)
    draw(path, folder / "own.png", "--digit=7", "--clip-guidance-scale=2.5", "--clip-prompt=a thick séven")
    draw(path, folder / "one.png", "--digit=7", "--count=3", "--clip-guidance-scale=2")
    draw(path, folder / "several.png", "--digit=7", "--digit=2", "--clip-guidance-scale=2")
    draw(path, folder / "each", "--digit=7", "--digit=2", "--clip-guidance-scale=2")
    draw(path, folder / "none.png", "--digit=7")
    return path, folder


def chunks_of_clip(path: Path) -> dict[str, str]:
    with Image.open(path) as image:
        text = image.text  # type: ignore[attr-defined]
    return {name: value for name, value in text.items() if name.startswith("CLIP")}


def test_png_with_clip_guidance_has_scale_prompt_and_model(with_clip: tuple[Path, Path]) -> None:
    _, folder = with_clip
    digest = {"CLIP-SHA256": Clip().sha256}
    own = {"CLIP-Guidance-Scale": "2.5", "CLIP-Prompt": r'"a thick s\u00e9ven"'}
    seven, two = ({"CLIP-Guidance-Scale": "2.0", "CLIP-Prompt": f'"{digit_prompt(d)}"'} for d in (7, 2))
    assert chunks_of_clip(folder / "own.png") == own | digest
    assert chunks_of_clip(folder / "one.png") == seven | digest
    assert chunks_of_clip(folder / "several.png") == {"CLIP-Guidance-Scale": "2.0"} | digest
    assert chunks_of_clip(folder / "each" / "digit-7-seed-5-0.png") == seven | digest
    assert chunks_of_clip(folder / "each" / "digit-2-seed-5-0.png") == two | digest
    assert chunks_of_clip(folder / "none.png") == {}


def test_default_prompt_of_a_class_that_is_no_digit_names_the_class(tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    names = ("cat", "dog", *map(str, range(10)))
    network = tiny_unet(image_size=28, num_steps=100, widths=(8, 8), num_classes=len(names))
    config = CheckpointConfig(network.config, ScheduleConfig(), class_names=names, probe=Probe(num_steps=2))
    checkpoint.save(tmp_path / "tiny.safetensors", network, config)
    draw(tmp_path / "tiny.safetensors", tmp_path / "each", "--label=dog", "--label=9", "--clip-guidance-scale=2")
    prompts = [chunks_of_clip(tmp_path / "each" / f"{name}-seed-5-0.png")["CLIP-Prompt"] for name in ("dog", "9")]
    assert prompts == ['"a photo of a dog"', f'"{digit_prompt(9)}"']


@pytest.mark.parametrize("name", ["own.png", "one.png", "several.png", "each/digit-2-seed-5-0.png", "none.png"])
def test_picture_with_clip_guidance_is_generated_again(
    with_clip: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path, folder = with_clip
    assert like(folder / name, f"--checkpoint={path}", f"--out={tmp_path / 'again.png'}", "--batch-size=2") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{folder / name} is identical"
    assert (tmp_path / "again.png").read_bytes() == (folder / name).read_bytes()


def test_picture_of_another_clip_model_is_refused_with_both_digests(
    with_clip: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = with_clip
    other = tmp_path / "other"
    shutil.copytree(EMBEDDED, other)
    weights = load_file(other / "open_clip_model.safetensors")
    save_file({**weights, "logit_scale": weights["logit_scale"] + 1}, other / "open_clip_model.safetensors")
    assert like(folder / "own.png", f"--checkpoint={path}", f"--clip-model={other}") == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert (
        f"was generated with the CLIP model {Clip().sha256}, but {other} has the digest {Clip(str(other)).sha256}."
        in said
    )


def test_clip_model_is_refused_for_a_picture_without_clip_guidance(
    with_clip: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = with_clip
    assert like(folder / "none.png", f"--checkpoint={path}", "--clip-model=embedded") == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "--clip-model has no effect" in said


def test_names_of_classes_are_found_as_the_service_finds_them() -> None:
    assert sample.choose_labels(["all"], ("some", "all")) == [1]
    assert sample.choose_labels(["all"], ("some", "none")) == [0, 1]
    assert sample.choose_labels(["CAFE\u0301", "cafe\u0301"], ("x", "café")) == [1]
