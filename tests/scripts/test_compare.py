import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from model.checkpoint import load, save
from model.sampler import Guidance
from scripts import compare, evaluate
from scripts.common.data.data_set import ImageSet
from scripts.common.drawing import Drawer, DrawingOptions
from scripts.evaluation import sweep, tables
from scripts.evaluation.sweep import show_steps
from tests.scripts.evaluation.bars import space_of_pixels
from tests.scripts.tiny_checkpoint import save_tiny_checkpoint
from tests.scripts.tiny_training import trust_idx_files, write_idx_files

NUM_IMAGES = 400


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("comparison")
    write_idx_files(folder / "data", num_images=NUM_IMAGES)
    save_tiny_checkpoint(folder / "tiny.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        trust_idx_files(patch, NUM_IMAGES)
        patch.setattr("scripts.common.mnist.NUM_VALIDATION", 100)
        patch.setattr(tables, "FEWEST_IMAGES", 10)  # the data has few images
        patch.setattr("scripts.evaluation.quality.spaces_for_digits", lambda *_: (space_of_pixels(),))
        patch.setattr("scripts.evaluation.comparison.spaces_for_digits", lambda *_: (space_of_pixels(),))
        yield folder


def arguments(inputs: Path, out: Path) -> list[str]:
    data, checkpoint = inputs / "data", inputs / "tiny.safetensors"
    return [f"--data-dir={data}", f"--checkpoint={checkpoint}", f"--out={out}", "--num-images=100"]


def error_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        compare.main(argv)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture(scope="module")
def swept(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("swept")
    compare.main(["steps", *arguments(inputs, out), "--steps", "1", "2", "--samplers", "ddim", "ddpm"])
    return out


def test_steps_evaluates_each_sampler_with_each_number_of_steps(swept: Path) -> None:
    rows = json.loads((swept / "steps.json").read_text())["figures"]
    drawn = [(row["options"]["sampler"], row["options"]["num_steps"]) for row in rows]
    assert drawn == [("ddim", 1), ("ddim", 2), ("ddpm", 1), ("ddpm", 2)]
    table = (swept / "steps.md").read_text().splitlines()
    assert len(table) == 2 + 4 + 1 + 2
    assert "| Fréchet ratio | ratio, CLIP | precision |" in table[0]
    assert len({line.count("|") for line in table[:7]}) == 1
    assert table[6].startswith("| real digits |  |  |  | ")
    assert " | 1.00 | " in table[6]
    assert table[8].startswith(
        "100 digits per setting, seed 1, compared with the validation split. Accuracy and the columns without the name"
    )
    assert table[2].startswith(
        f"| ddim | 1 | 1.5 in 2-8 | 1 | {rows[0]['extractor']:.2%} |"
    )  # guidance only applies at t = 12
    assert table[3].startswith(
        f"| ddim | 2 | 1.5 in 2-8 | 3 | {rows[1]['extractor']:.2%} |"
    )  # one evaluation at t = 12, two at t = 6
    with Image.open(swept / "steps.png") as image:
        assert min(image.size) > 100


def test_sweep_has_the_results_of_scripts_evaluate(inputs: Path, swept: Path, tmp_path: Path) -> None:
    options = ["--split=validation", "--sampler=ddim", "--num-steps=2", "--seed=1"]
    evaluate.main(["digits", *arguments(inputs, tmp_path), *options])
    alone = json.loads((tmp_path / "evaluation.json").read_text())
    row = json.loads((swept / "steps.json").read_text())["figures"][1]
    assert row["frechet_ratio"] == alone["frechet_ratio"]
    assert row["clip_frechet_ratio"] == alone["clip_frechet_ratio"] != alone["frechet_ratio"]
    assert row["judge"] == alone["judge"]["accuracy"]
    assert row["extractor_worst"] == min(alone["extractor"]["per_class"])


def test_stopped_sweep_continues_with_the_missing_settings(
    inputs: Path, swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "steps.json").write_bytes((swept / "steps.json").read_bytes())
    drawn: list[int] = []
    draw = sweep.draw_samples

    def watch(drawer: Drawer, options: DrawingOptions, *args: Any, **named: Any) -> ImageSet:
        drawn.append(options.num_steps)
        return draw(drawer, options, *args, **named)

    monkeypatch.setattr(sweep, "draw_samples", watch)
    compare.main(["steps", *arguments(inputs, tmp_path), "--steps", "1", "3", "--samplers", "ddim"])
    assert drawn == [3]
    assert len((tmp_path / "steps.md").read_text().splitlines()) == 2 + 2 + 1 + 2


def test_sweep_of_another_seed_or_damaged_file_is_rejected(
    inputs: Path, swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "steps.json").write_bytes((swept / "steps.json").read_bytes())
    assert "another checkpoint, CLIP model, seed" in error_of(
        ["steps", *arguments(inputs, tmp_path), "--seed=0"], capsys
    )
    content = json.loads((swept / "steps.json").read_text())
    del content["figures"][0]["evaluations"]
    for damaged in ([], content):
        (tmp_path / "steps.json").write_text(json.dumps(damaged))
        assert "is not a result of a sweep" in error_of(["steps", *arguments(inputs, tmp_path)], capsys)


def test_sweep_of_too_few_images_has_a_note_instead_of_distances(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "FEWEST_IMAGES", 1_000)
    for _ in range(2):  # the second run reads the file
        compare.main(["steps", *arguments(inputs, tmp_path), "--steps", "1", "2", "--samplers", "ddim"])
        content = json.loads((tmp_path / "steps.json").read_text())
        assert [row["frechet_ratio"] for row in (*content["figures"], content["real"])] == [None] * 3
        *_, note = table = (tmp_path / "steps.md").read_text().splitlines()
        assert (
            note == "Too few images for a Fréchet distance: 80, at least 1,000 needed."
        )  # there are 80 held-out digits
        assert [line.split(" | ")[6] for line in table[2:5]] == ["-"] * 3
        with Image.open(tmp_path / "steps.png") as image:
            assert min(image.size) > 100


def test_guidance_sweep_covers_guidance_off_and_all_scales_and_intervals(inputs: Path, tmp_path: Path) -> None:
    swept = ["--scales", "1", "2", "--intervals", "1-10", "3-5", "--num-steps=2", "--sampler=dpmpp"]
    compare.main(["guidance", *arguments(inputs, tmp_path), *swept])
    guidances = [row["options"]["guidance"] for row in json.loads((tmp_path / "guidance.json").read_text())["figures"]]
    assert [(g["scale"], g["start"], g["stop"]) for g in guidances] == [(1, 1, 100), (2, 1, 10), (2, 3, 5)]
    assert [line.split(" | ")[2] for line in (tmp_path / "guidance.md").read_text().splitlines()[2:5]] == [
        "off",
        "2 in 1-10",
        "2 in 3-5",
    ]


def test_steps_uses_the_recommended_guidance_of_each_sampler(inputs: Path, tmp_path: Path) -> None:
    loaded = load(save_tiny_checkpoint(tmp_path / "tiny.safetensors"))
    config = dataclasses.replace(loaded.config, guidance_by_sampler={"ddpm": Guidance(3.0, 4, 6)})
    save(tmp_path / "own.safetensors", loaded.network, config)
    options = [f"--checkpoint={tmp_path / 'own.safetensors'}", "--samplers", "ddim", "ddpm", "--steps", "1"]
    compare.main(["steps", *arguments(inputs, tmp_path), *options])
    rows = json.loads((tmp_path / "steps.json").read_text())["figures"]
    assert [row["options"]["guidance"]["scale"] for row in rows] == [1.5, 3.0]


def test_plot_has_a_line_per_sampler() -> None:
    def row(sampler: str, num_steps: int, extractor: float, ratio: float) -> dict[str, Any]:
        options = {"sampler": sampler, "num_steps": num_steps}
        return {"options": options, "extractor": extractor, "frechet_ratio": ratio}

    rows = [row("ddpm", 10, 0.75, 4), row("ddpm", 20, 0.875, 2), row("ddim", 10, 0.5, 3)]
    left, right = show_steps(rows, 100).axes
    assert [list(line.get_ydata()) for line in left.lines] == [[0.25, 0.125], [0.5]]
    assert [list(line.get_ydata()) for line in right.lines[:2]] == [[4, 2], [3]]
    assert [list(line.get_xdata()) for line in left.lines] == [[10, 20], [10]]


def test_runs_writes_a_table_of_evaluations(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, scale in (("one", "1"), ("two", "2")):
        options = ["--num-steps=1", f"--guidance-scale={scale}", "--split=validation"]
        evaluate.main(["digits", *arguments(inputs, tmp_path / name), *options])
    one, two = tmp_path / "one", tmp_path / "two"
    compare.main(["runs", str(one), str(two), f"--out={tmp_path / 'table.md'}"])
    lines = (tmp_path / "table.md").read_text().splitlines()
    content = json.loads((two / "evaluation.json").read_text())
    assert [line.split(" | ")[:4] for line in lines[2:]] == [
        ["| one", "ddpm", "1", "off"],
        ["| two", "ddpm", "1", "2 in 2-8"],
    ]
    shares = [f"{content[network]['accuracy']:.2%}" for network in ("extractor", "judge")]
    assert lines[3].split(" | ")[4:6] == shares
    assert lines[2] in capsys.readouterr().out
    compare.main(["runs", str(one), str(two / "evaluation.json"), "--across", f"--out={tmp_path / 'across.md'}"])
    across = [line.split(" | ") for line in (tmp_path / "across.md").read_text().splitlines()]
    assert across[0][1:] == ["one", "two", "real digits |"]
    assert across[2][2] == f"{content['judge']['accuracy']:.2%}"
    assert "have the same folder name" in error_of(["runs", str(two), str(two / "evaluation.json")], capsys)
    content["num_images"] = 50
    (two / "evaluation.json").write_text(json.dumps(content))
    assert "differ in num_images" in error_of(["runs", str(one), str(two)], capsys)
    content["judge"]["per_class"] = []
    (two / "evaluation.json").write_text(json.dumps(content))
    assert "is not an evaluation" in error_of(["runs", str(two)], capsys)
    content = json.loads((one / "evaluation.json").read_text())
    del content["networks"]
    (two / "evaluation.json").write_text(json.dumps(content))
    assert "is not an evaluation" in error_of(["runs", str(two)], capsys)
    assert "cannot be read" in error_of(["runs", str(tmp_path / "none")], capsys)


def test_sweep_that_the_checkpoint_does_not_permit_is_rejected(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_checkpoint(tmp_path / "tiny.safetensors", label_drop=0, guidance=Guidance())
    given = [*arguments(inputs, tmp_path), f"--checkpoint={tmp_path / 'tiny.safetensors'}"]
    assert "does not support guidance" in error_of(["guidance", *given], capsys)
    assert "10 steps" in error_of(["guidance", *arguments(inputs, tmp_path), "--intervals", "2-11"], capsys)
    assert "does not permit" in error_of(["steps", *given, "--steps", "2", "99"], capsys)
    assert "is not a multiple of 10" in error_of(["steps", *given, "--num-images=105"], capsys)


def test_runs_needs_no_evaluation_packages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ["torchmetrics", *(name for name in sys.modules if name.startswith("torchmetrics."))]:
        monkeypatch.setitem(sys.modules, name, None)  # makes the import fail
    published = Path(__file__).parents[2] / "docs" / "results" / "final"
    compare.main(["runs", str(published / "ddpm"), str(published / "fast")])
    assert "| fast |" in capsys.readouterr().out
    assert "torchmetrics is not installed" in error_of(["steps", "--out=nowhere"], capsys)


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        ["guidance", "--intervals", "80-20"],
        ["guidance", "--scales", "0.5"],
        ["guidance", "--guidance-scale=2", "--out=here"],
        ["steps", "--samplers", "x"],
        ["steps", "--num-steps=10", "--out=here"],
        ["steps", "--split=test", "--out=here"],
    ],
)
def test_wrong_argument_gives_an_error_of_one_line(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of(wrong, capsys).startswith("python -m scripts.compare")
