import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from model.checkpoint import load
from model.editing import start_timestep
from scripts import evaluate, make_dataset, train_classifiers
from scripts.common import drawing
from scripts.evaluation import classifier_training, denoising, tables
from scripts.evaluation.classifiers import KINDS, load_classifier, save_classifier
from scripts.evaluation.editing import STRENGTHS
from scripts.evaluation.handwriting import load_handwriting, load_letters
from scripts.evaluation.inpainting import MASKS
from tests.scripts.evaluation.bars import space_of_pixels
from tests.scripts.tiny_checkpoint import save_tiny_checkpoint
from tests.scripts.tiny_training import NUM_VALIDATION, trust_idx_files, write_idx_files

NUM_IMAGES = 200


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Returns a folder with test data in place of MNIST, a tiny checkpoint, and untrained classifiers."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_idx_files(folder / "data", num_images=NUM_IMAGES)
    save_tiny_checkpoint(folder / "tiny.safetensors")
    for kind, new in KINDS.items():
        torch.manual_seed(0)
        save_classifier(folder / f"{kind}.safetensors", kind, new(), {"test_accuracy": 0.125, "num_test": 80})
    with pytest.MonkeyPatch.context() as patch:
        trust_idx_files(patch, NUM_IMAGES)
        patch.setattr(tables, "FEWEST_IMAGES", 100)  # the data has few images
        patch.setattr("scripts.evaluation.quality.spaces_for_digits", lambda *_: (space_of_pixels(),))
        yield folder


def arguments(inputs: Path, *more: str) -> list[str]:
    networks = [f"--{kind}={inputs / kind}.safetensors" for kind in ("judge", "extractor")]
    return [f"--data-dir={inputs / 'data'}", f"--checkpoint={inputs / 'tiny.safetensors'}", *networks, *more]


def run(inputs: Path, out: Path, *more: str) -> dict[str, object]:
    evaluate.main(["digits", *arguments(inputs, f"--out={out}", *more)])
    written: dict[str, object] = json.loads((out / "evaluation.json").read_text())
    return written


def evaluate_folder(inputs: Path, out: Path, images: Path, *more: str) -> dict[str, object]:
    given = [argument for argument in arguments(inputs) if not argument.startswith("--checkpoint")]
    evaluate.main(["digits", *given, f"--images={images}", f"--out={out}", *more])
    written: dict[str, object] = json.loads((out / "evaluation.json").read_text())
    return written


def test_folder_has_the_same_metrics_as_its_checkpoint(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--num-steps", "2", "--guidance-scale", "2", "--guidance-stop", "7", "--seed", "5"]
    drawn = run(inputs, tmp_path / "drawn", "--num-images", "100", *options)
    assert (tmp_path / "drawn" / "evaluation.md").read_text().strip() in capsys.readouterr().out
    guidance = {"scale": 2.0, "start": 2, "stop": 7}
    assert drawn["options"] == {"sampler": "ddpm", "num_steps": 2, "guidance": guidance}
    assert drawn["weights_sha256"] == load(inputs / "tiny.safetensors").weights_sha256
    for name in ("confusion.png", "nearest.png"):
        with Image.open(tmp_path / "drawn" / name) as image:
            assert min(image.size) > 100
    for form in ("png", "idx", "parquet"):
        made = tmp_path / form
        given = [f"--checkpoint={inputs / 'tiny.safetensors'}", f"--out={made}", "--count=100"]
        make_dataset.main([*given, f"--format={form}", *options])
        read = evaluate_folder(inputs, tmp_path / f"read {form}", made)
        assert read.pop("images") == form
        for name in ("frechet", "frechet_ratio"):  # these values are summed in another order
            assert read.pop(name) == pytest.approx(drawn[name], rel=1e-9)
        assert read == {name: value for name, value in drawn.items() if name in read}
        assert len(read) == len(drawn) - 2
    (made / "dataset.json").unlink()
    unknown = evaluate_folder(inputs, tmp_path / "unknown", made)
    assert "options" not in unknown
    assert unknown["judge"] == drawn["judge"]


def test_folder_is_evaluated_with_equally_many_of_each_digit(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"--checkpoint={inputs / 'tiny.safetensors'}", "--num-steps=1"]
    make_dataset.main([*given, f"--out={tmp_path / 'large'}", "--count=125", "--format=png"])
    make_dataset.main([*given, f"--out={tmp_path / 'small'}", "--count=100"])
    large, small = (evaluate_folder(inputs, tmp_path / f"of {n}", tmp_path / n) for n in ("large", "small"))
    assert "Using the first 12 images of each digit, of 125 images" in capsys.readouterr().out
    assert (large["num_images"], small["num_images"]) == (120, 100)
    asked = evaluate_folder(inputs, tmp_path / "asked", tmp_path / "large", "--num-images=100")
    assert {**asked, "images": "small"} == small


def redraw(inputs: Path, out: Path, *command: str) -> dict[str, Any]:
    """Runs `inpaint` or `edit` with the tiny checkpoint. Returns the content of the JSON file."""
    given = [f"--data-dir={inputs / 'data'}", f"--checkpoint={inputs / 'tiny.safetensors'}"]
    evaluate.main([*command, *given, f"--judge={inputs / 'judge.safetensors'}", f"--out={out / 'shown.png'}"])
    with Image.open(out / "shown.png") as image:
        assert min(image.size) > 100
    written: dict[str, Any] = json.loads((out / "shown.json").read_text())
    return written


def test_inpaint_measures_every_mask_with_and_without_the_class(inputs: Path, tmp_path: Path) -> None:
    command = ["inpaint", "--num-images=10", "--num-steps=4", "--num-resamplings=2", "--guidance-scale=1"]
    written = redraw(inputs, tmp_path, *command)
    assert [(row["mask"], row["class_given"]) for row in written["masks"]] == [
        (mask, given) for mask in MASKS for given in (True, False)
    ]
    assert [row["calls"] for row in written["masks"] if row["class_given"]] == [1 + 3 * 2] * 4
    for row in written["masks"]:
        assert row["changed"] == 0
        assert row["border_ratio"] == pytest.approx(row["border_step"] / row["border_step_of_real"])
        assert (row["guessed"] is None) == row["class_given"]
        assert row["class_given"] or row["calls"] > 2 * (1 + 3 * 2)


def test_edit_starts_at_the_timestep_of_each_strength(inputs: Path, tmp_path: Path) -> None:
    written = redraw(inputs, tmp_path, "edit", "--num-images=10", "--num-steps=5", "--guidance-scale=1")
    schedule = load(inputs / "tiny.safetensors").schedule
    assert [(row["strength"], row["class_given"], row["t"]) for row in written["strengths"]] == [
        (strength, given, start_timestep(schedule, strength)) for given in (True, False) for strength in STRENGTHS
    ]
    assert written["num_images"] == 10


@pytest.mark.parametrize(
    "command",
    [
        ["fog"],
        ["clip"],
        ["clip-guidance"],
        ["clip-attributes"],
        ["clip-prompts"],
        ["synthetic", "set"],
        ["recognize"],
        ["handwriting"],
        ["denoise"],
        ["inpaint"],
        ["edit"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("out", ["figures", "figures.txt", "folder.png", "folder.json"])
def test_invalid_out_is_rejected_before_the_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str], out: str
) -> None:
    for name in ("folder.png", "folder.json"):
        (tmp_path / name).mkdir()
    with pytest.raises(SystemExit) as exit_:
        evaluate.main([*command, f"--out={tmp_path / out}"])
    assert exit_.value.code == 2
    assert "does not end in" in (error := capsys.readouterr().err) or "is a folder" in error


@pytest.mark.parametrize("option", ["--seed=0", "--batch-size=64", "--guidance-scale=2", "--compile"])
def test_sampling_option_with_images_is_rejected_even_at_its_default(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        evaluate_folder(inputs, tmp_path, tmp_path, option)
    assert exit_.value.code == 2
    assert f"{option.partition('=')[0]} has no effect on existing images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (["--num-images", "105"], "multiple of 10"),
        (["--num-images", "50"], "100 to"),
        (["--split", "train"], "invalid choice"),
        (["--judge", "nowhere.safetensors"], "cannot be read"),
        (["--checkpoint", "nowhere.safetensors"], "cannot be read"),
        (["--images", "nowhere"], "--checkpoint has no effect on existing images"),
        (["--num-images", "50000"], "100 to 10000"),
        (["--num-images", "5010", "--split", "training"], "must be at most 5000 with --split training"),
        (["--num-images", "100", "--out", "/proc/none"], "No such file"),
        (["--data-dir", "nowhere"], "no MNIST files"),
    ],
)
def test_wrong_argument_gives_an_error_of_one_line_and_status_2(
    inputs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, wrong: list[str], reason: str
) -> None:
    monkeypatch.setattr("torchvision.datasets.MNIST", lambda *args, **options: (_ for _ in ()).throw(OSError("none")))
    with pytest.raises(SystemExit) as exit_:
        evaluate.main(["digits", *arguments(inputs, *wrong)])
    assert exit_.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert reason in sentence


def test_fog_prints_and_plots_each_digit(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [f"--data-dir={inputs / 'data'}", f"--checkpoint={inputs / 'tiny.safetensors'}"]
    evaluate.main(["fog", *given, f"--judge={inputs / 'fog_judge.safetensors'}", f"--out={tmp_path / 'fog.png'}"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "informedness" in line]
    assert [line[:2] for line in lines] == [f"{digit}:" for digit in range(10)]
    content = json.loads((tmp_path / "fog.json").read_text())
    for shares in (content["recognised"], content["told"]):
        assert [len(line) for line in shares] == [len(content["t"])] * 10
    with Image.open(tmp_path / "fog.png") as image:
        assert min(image.size) > 100


def test_handwriting_prints_each_font_and_variant_and_shows_wrong_pictures(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"--checkpoint={inputs / 'tiny.safetensors'}", "--split=validation", "--num-pairs=1"]
    evaluate.main(["handwriting", *given, f"--out={tmp_path / 'handwriting.png'}"])
    content = json.loads((tmp_path / "handwriting.json").read_text())
    pictures = load_handwriting("validation")
    assert (content["num_digits"], content["num_letters"]) == (len(pictures), len(load_letters("validation")))
    names = {picture.font for picture in pictures} | {picture.variant for picture in pictures}
    printed = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert names <= set(printed)
    assert content["of_font"].keys() | content["of_variant"].keys() == names
    for group in ("of_font", "of_variant", "of_digit"):  # the groups of a kind have equal sizes
        assert sum(content[group].values()) / len(content[group]) == pytest.approx(content["recognised"])
    assert content["evaluations_an_image"] == 10
    with Image.open(tmp_path / "handwriting.png") as image:
        assert min(image.size) > 100


def test_denoise_prints_and_shows_each_level(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(denoising, "LEVELS", (3, 6))
    monkeypatch.setattr(denoising, "SEARCH_LEVELS", (2, 5, 90))  # there is no timestep 90
    given = [f"--data-dir={inputs / 'data'}", f"--checkpoint={inputs / 'tiny.safetensors'}", "--num-images=12"]
    evaluate.main(["denoise", *given, f"--out={tmp_path / 'denoise.png'}"])
    tables = [line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [cells[0] for cells in tables[2:4]] == ["| 3", "| 6"]
    assert [cells[1] for cells in tables[-2:]] == ["2", "5"]
    content = json.loads((tmp_path / "denoise.json").read_text())
    assert (content["split"], content["num_images"]) == ("test", 12)
    low, high = content["levels"]
    assert low["psnr_noisy"] > high["psnr_noisy"]
    assert [row["t"] for row in content["searches"]] == [2, 5]
    with Image.open(tmp_path / "denoise.png") as image:
        assert min(image.size) > 100


def test_denoise_prints_the_best_constants_for_the_validation_split(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(denoising, "LEVELS", (3,))
    monkeypatch.setattr(denoising, "SEARCH_LEVELS", (2, 5))
    given = [f"--data-dir={inputs / 'data'}", f"--checkpoint={inputs / 'tiny.safetensors'}", "--num-images=12"]
    evaluate.main(["denoise", *given, "--split=validation", f"--out={tmp_path / 'denoise.png'}"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("best constants")]
    assert re.fullmatch(r"best constants for these digits: ODDS_SCALE \S+, PREDICTION_VARIANCE \S+", line)


def test_clip_scores_are_computed_on_request(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("open_clip")
    written = run(inputs, tmp_path / "drawn", "--num-images", "100", "--num-steps", "2", "--clip")
    assert set(written["clip"]) == {"model", "weights_sha256", "drawn", "real"}  # type: ignore[call-overload]
    assert "| CLIP embedded: more clear than noisy | " in capsys.readouterr().out
    given = [a for a in arguments(inputs) if not a.startswith(("--judge", "--extractor"))]
    evaluate.main(["clip", *given, "--num-steps=3", "--num-images=10", f"--out={tmp_path / 'clip.png'}"])
    assert len([line for line in capsys.readouterr().out.splitlines() if "at t = 10," in line]) == 3
    with Image.open(tmp_path / "clip.png") as image:
        assert min(image.size) > 100
    content = json.loads((tmp_path / "clip.json").read_text())
    assert (content["options"]["num_steps"], content["num_images"], content["split"]) == (3, 10, "test")
    assert content["weights_sha256"] == load(inputs / "tiny.safetensors").weights_sha256
    assert content["clip"] == {name: written["clip"][name] for name in ("model", "weights_sha256")}  # type: ignore[index]
    assert [len(lines["drawn"]) for lines in content["scores"].values()] == [len(content["t"])] * 3


def test_missing_clip_model_is_rejected_before_generating(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("open_clip")
    with pytest.raises(SystemExit) as exit_:
        run(inputs, tmp_path, "--clip", "nowhere")
    assert exit_.value.code == 2
    output = capsys.readouterr()
    assert "Cannot load CLIP model 'nowhere'" in output.err
    assert output.out == ""


def test_synthetic_compares_generated_and_real_training_digits(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifier_training, "BATCH_SIZE", 8)
    drawing = [f"--checkpoint={inputs / 'tiny.safetensors'}", "--num-steps=1", "--count=100"]
    make_dataset.main([f"--out={tmp_path / 'set'}", *drawing])
    given = [f"--data-dir={inputs / 'data'}", "--epochs=3", f"--out={tmp_path / 'learned.json'}"]
    evaluate.main(["synthetic", str(tmp_path / "set"), *given])
    drawn, real = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Trained on")]
    assert drawn.startswith("Trained on 100 generated digits: ")
    assert real.startswith(f"Trained on {NUM_IMAGES - NUM_VALIDATION} real digits: ")
    written = json.loads((tmp_path / "learned.json").read_text())
    assert f"{written['drawn']['accuracy']:.2%}" in drawn
    assert written["drawn_with"]["options"]["num_steps"] == 1
    assert float(real.split()[5].rstrip("%")) > 2 * float(drawn.split()[5].rstrip("%"))


def test_train_classifiers_saves_a_classifier(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifier_training, "BATCH_SIZE", 8)
    out = tmp_path / "extractor.safetensors"
    train_classifiers.main(["extractor", f"--data-dir={inputs / 'data'}", f"--out={out}", "--epochs", "2"])
    trained = load_classifier("extractor", out)
    assert f"Recognised {trained.facts['validation_accuracy']:.2%} of the validation images" in capsys.readouterr().out
    assert (trained.facts["num_test"], trained.facts["epochs"]) == (NUM_IMAGES, 2)


@pytest.mark.parametrize("kind", classifier_training.RECIPES)
def test_shipped_classifiers_were_trained_with_their_recipes(kind: str) -> None:
    assert classifier_training.RECIPES[kind].items() <= load_classifier(kind).facts.items()


@pytest.mark.parametrize(
    "wrong",
    [[], ["critic"], ["judge", "--epochs", "many"], ["judge", "--data-dir", "nowhere"], ["judge", "--out", "x"]],
)
def test_wrong_argument_of_train_classifiers_gives_an_error_of_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, wrong: list[str]
) -> None:
    monkeypatch.setattr("torchvision.datasets.MNIST", lambda *args, **options: (_ for _ in ()).throw(OSError("none")))
    with pytest.raises(SystemExit) as exit_:
        train_classifiers.main(wrong)
    assert exit_.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


WITHOUT_TORCHMETRICS = """
import sys
sys.modules["torchmetrics"] = None
from scripts import evaluate, ship
for arguments in ("--help", "fog --help", "fog --out=fog.png --checkpoint=missing", "digits"):
    try:
        evaluate.main(arguments.split())
    except SystemExit as exit_:
        print(exit_.code, file=sys.stderr)
"""


def test_only_commands_with_distances_need_torchmetrics_and_print_how_to_install_it() -> None:
    ended = subprocess.run([sys.executable, "-c", WITHOUT_TORCHMETRICS], capture_output=True, text=True, check=True)
    *without, missing, status = ended.stderr.splitlines()
    assert without[:2] == ["0", "0"]
    assert "missing" in without[2]
    assert without[3:] == ["2"]
    assert (missing, status) == ("torchmetrics is not installed. Install with: pip install -e '.[evaluate]'", "2")


@pytest.mark.parametrize(
    "command",
    [["digits"], ["fog", "--out=fog.png"], ["clip", "--out=clip.png"], ["denoise", "--out=denoise.png"]],
    ids=" ".join,
)
def test_missing_matplotlib_is_rejected_before_generating(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("samples_of_checkpoint", "evaluate_digits", "evaluate_fog", "evaluate_clip", "evaluate_denoising"):
        monkeypatch.setattr(evaluate, name, lambda *_: pytest.fail("begun"))
    with pytest.raises(SystemExit) as exit_:
        evaluate.main(command)
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "matplotlib is not installed. Install with: pip install -e '.[evaluate]'\n"


def test_too_few_images_for_a_distance_are_noted_in_output_and_files(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "FEWEST_IMAGES", 1_000)
    written = run(inputs, tmp_path, "--num-images=110", "--num-steps=1")
    note = "Too few generated images for a Fréchet distance: 110, at least 1,000 needed."
    assert note in capsys.readouterr().out.splitlines()
    assert note in (tmp_path / "evaluation.md").read_text().splitlines()
    assert (written["notes"][0], written["frechet"], written["frechet_ratio"]) == (note, None, None)
    assert tables.as_run("small", tables.read_evaluation(tmp_path))[7] == "-"


def test_missing_data_is_rejected_before_compiling(
    inputs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchvision.datasets.MNIST", lambda *args, **options: (_ for _ in ()).throw(OSError("none")))
    monkeypatch.setattr(drawing, "compiled_step", lambda *_: pytest.fail("compiled"))
    with pytest.raises(SystemExit):
        evaluate.main(["digits", *arguments(inputs, "--compile", "--data-dir=nowhere")])
    assert "no MNIST files" in capsys.readouterr().err
