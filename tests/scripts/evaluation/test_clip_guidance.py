import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from model.clip import EMBEDDED
from model.clip_guidance import START, STOP
from model.prompts import digit_prompt
from scripts import evaluate
from scripts.common.data.data_set import ImageSet
from scripts.common.drawing import Drawer, DrawingOptions
from scripts.evaluation import sweep, tables
from scripts.evaluation.clip import ClipScorer
from scripts.evaluation.clip_guidance import show_clip_guidance
from scripts.evaluation.samples import load_references
from tests.scripts.tiny_checkpoint import save_tiny_checkpoint
from tests.scripts.tiny_training import trust_idx_files, write_idx_files

pytest.importorskip("open_clip")
NUM_IMAGES = 400
SWEPT = ["--scales", "2", "5", "--intervals", "40-60"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("inputs")
    write_idx_files(folder / "data", num_images=NUM_IMAGES)
    save_tiny_checkpoint(folder / "tiny.safetensors", num_steps=100)
    with pytest.MonkeyPatch.context() as patch:
        trust_idx_files(patch, NUM_IMAGES)
        patch.setattr("scripts.common.mnist.NUM_VALIDATION", 100)
        patch.setattr(tables, "FEWEST_IMAGES", 10)  # the data has few images
        yield folder


def run(inputs: Path, out: Path, *more: str) -> None:
    """Runs the sweep with 2 steps, at t = 100 and t = 50. Later arguments replace earlier ones."""
    data, checkpoint = inputs / "data", inputs / "tiny.safetensors"
    given = [f"--data-dir={data}", f"--checkpoint={checkpoint}", f"--out={out}", "--num-steps=2"]
    evaluate.main(["clip-guidance", *given, "--num-images=100", "--num-test-images=110", *SWEPT, *more])


@pytest.fixture(scope="module")
def swept(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("swept") / "swept.png"
    run(inputs, out, "--guidance-scale=2", "--guidance-stop=60", "--clip-guidance-scale=3")
    return out


def read(swept: Path, split: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(swept.with_name(f"swept.{split}.json").read_text())
    return content


def settings_of(rows: list[dict[str, Any]]) -> list[tuple[float, float, int, int]]:
    """Returns the scale of guidance, and scale and interval of CLIP guidance."""
    off = {"guidance": {"scale": 0, "start": 0, "stop": 0}}
    found = []
    for row in rows:
        clip = row["options"].get("clip", off)["guidance"]
        found.append((row["options"]["guidance"]["scale"], clip["scale"], clip["start"], clip["stop"]))
    return found


def test_sweep_has_every_scale_and_interval_with_and_without_guidance(swept: Path) -> None:
    validation, test = read(swept, "validation"), read(swept, "test")
    clip = [(0, 0, 0), (2, 40, 60), (5, 40, 60)]
    assert settings_of(validation["figures"]) == [(scale, *each) for scale in (1, 2) for each in clip]
    assert settings_of(test["figures"]) == [
        (scale, *each) for scale in (1, 2) for each in ((0, 0, 0), (3, START, STOP))
    ]
    for content, num_images, seed in ((validation, 100, 1), (test, 110, 4)):
        assert (content["sweep"]["num_images"], content["sweep"]["seed"]) == (num_images, seed)
        assert content["sweep"]["clip_sha256"] == ClipScorer().sha256
    assert (validation["sweep"]["split"], test["sweep"]["split"]) == ("validation", "test")
    with Image.open(swept) as image:
        assert min(image.size) > 100


def test_clip_guidance_increases_the_similarity(swept: Path) -> None:
    similarity = [row["similarity"] for row in read(swept, "validation")["figures"]]
    for off, two, five in (similarity[:3], similarity[3:]):
        assert off < two < five


def test_similarity_of_real_digits_is_that_of_their_prompts(inputs: Path, swept: Path) -> None:
    real = load_references("validation", inputs / "data").held_out
    scores = ClipScorer().similarities(real.images, [digit_prompt(d) for d in range(10)])
    expected = scores.gather(1, real.labels[:, None]).mean().item()
    assert read(swept, "validation")["real"]["similarity"] == pytest.approx(expected, rel=1e-6)


def test_table_has_a_row_for_every_setting_and_real_digits(swept: Path) -> None:
    lines = swept.with_suffix(".md").read_text().splitlines()
    table = [line for line in lines if line.startswith("| ") and "CLIP similarity" not in line]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table if "---" not in line]
    assert [row[:2] for row in cells[:3]] == [["off", "off"], ["off", "2 in 40-60"], ["off", "5 in 40-60"]]
    assert [row[:2] for row in cells[-3:]] == [
        ["2 in 2-60", "off"],
        ["2 in 2-60", f"3 in {START}-{STOP}"],
        ["real digits", ""],
    ]
    rows = read(swept, "validation")["figures"]
    assert [row[3] for row in cells[:6]] == [f"{row['judge']:.2%}" for row in rows]
    assert [row[9] for row in cells[:6]] == [f"{row['similarity']:.3f}" for row in rows]
    assert len(cells) == 6 + 1 + 4 + 1
    assert cells[6][6] == "1.00"


def test_stopped_sweep_continues_with_the_missing_settings(
    inputs: Path, swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("validation", "test"):
        name = f"swept.{split}.json"
        (tmp_path / name).write_bytes((swept.parent / name).read_bytes())
    drawn: list[Any] = []
    draw = sweep.draw_samples

    def watch(drawer: Drawer, options: DrawingOptions, *args: Any, **named: Any) -> ImageSet:
        drawn.append(options.clip and options.clip.guidance)
        return draw(drawer, options, *args, **named)

    monkeypatch.setattr(sweep, "draw_samples", watch)
    changed = ["--intervals", "40-60", "1-50", "--scales", "5", "--guidance-scale=1", "--clip-guidance-scale=3"]
    run(inputs, tmp_path / "swept.png", *changed)
    assert [(g.scale, g.start, g.stop) for g in drawn] == [(5, 1, 50)]
    table = (tmp_path / "swept.md").read_text()
    shown = ["off | off", "off | 2 in 40-60", "off | 5 in 40-60", "off | 5 in 1-50", "2 in 2-60 | 2 in 40-60"]
    assert [table.count(f"| {setting} |") for setting in shown] == [2, 1, 1, 1, 1]  # those of earlier runs, too


def test_plot_has_a_line_for_each_interval_that_starts_without_clip_guidance() -> None:
    def row(scale: float, interval: tuple[int, int], guidance: float, value: float) -> dict[str, Any]:
        clip = {"clip": {"guidance": {"scale": scale, "start": interval[0], "stop": interval[1]}}} if scale else {}
        options = {"guidance": {"scale": guidance}, **clip}
        return {"options": options, "judge": 1 - value, "frechet_ratio": 1 + value, "similarity": value}

    rows = [
        row(0, (0, 0), 1, 0.25),
        row(2, (5, 60), 1, 0.125),
        row(1, (5, 60), 1, 0.5),
        row(1, (20, 60), 1, 0.0625),
        row(0, (0, 0), 3, 0.75),
        row(1, (20, 60), 3, 0.875),
    ]
    figure = show_clip_guidance(rows, {"similarity": 0.3})
    wrong, ratio, similarity = figure.axes
    lines = [list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in wrong.lines]
    assert lines == [
        [(0, 0.25), (1, 0.5), (2, 0.125)],
        [(0, 0.25), (1, 0.0625)],
        [(0, 0.75)],
        [(0, 0.75), (1, 0.875)],
    ]
    legend = wrong.get_legend()
    assert legend
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["t = 5 to 60", "t = 20 to 60", "t = 20 to 60, with guidance"]
    assert list(ratio.lines[1].get_ydata()) == [1.25, 1.0625]
    assert list(similarity.lines[-1].get_ydata()) == [0.3, 0.3]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (["--intervals", "5-101"], "An interval ends at 101, but the checkpoint has 100 steps"),
        (["--intervals", "60-5"], "is not an interval of timesteps"),
        (["--scales", "11"], "is not a number from 0 to 10"),
        (["--clip-guidance-scale", "0"], "--clip-guidance-scale must be above 0"),
        (["--clip-model", "nowhere"], "Cannot load CLIP model 'nowhere'"),
        (["--seed", "1"], "unrecognized arguments: --seed 1"),
    ],
    ids=lambda given: " ".join(given)[:40],
)
def test_wrong_argument_gives_an_error_of_one_line(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: list[str], reason: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run(inputs, tmp_path / "swept.png", *wrong)
    assert exit_.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert reason in sentence
    assert not list(tmp_path.iterdir())


def test_file_of_another_clip_model_is_rejected(
    inputs: Path, swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = read(swept, "validation")
    content["sweep"]["clip_sha256"] = "0" * 64
    (tmp_path / "swept.validation.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        run(inputs, tmp_path / "swept.png", f"--clip-model={EMBEDDED}")
    assert "has results of another checkpoint, CLIP model, seed" in capsys.readouterr().err
