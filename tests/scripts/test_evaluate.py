import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from model.checkpoint import load
from scripts import evaluate, make_dataset, train_classifiers
from scripts.common import drawing
from scripts.evaluation import classifier_training, tables
from scripts.evaluation.classifiers import KINDS, load_classifier, save_classifier
from tests.scripts.tiny_checkpoint import save_tiny_checkpoint
from tests.scripts.tiny_training import NUM_VALIDATION, trust_idx_files, write_idx_files

NUM_IMAGES = 200


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with made-up data, trusted as if they were MNIST's, a checkpoint, and classifiers that know nothing."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_idx_files(folder / "data", num_images=NUM_IMAGES)
    save_tiny_checkpoint(folder / "tiny.safetensors")
    for kind, new in KINDS.items():
        torch.manual_seed(0)
        save_classifier(folder / f"{kind}.safetensors", kind, new(), {"test_accuracy": 0.125, "num_test": 80})
    with pytest.MonkeyPatch.context() as patch:
        trust_idx_files(patch, NUM_IMAGES)
        patch.setattr(tables, "FEWEST_IMAGES", 100)  # there are few
        yield folder


def arguments(workplace: Path, *more: str) -> list[str]:
    networks = [f"--{kind}={workplace / kind}.safetensors" for kind in ("judge", "extractor")]
    return [f"--data-dir={workplace / 'data'}", f"--checkpoint={workplace / 'tiny.safetensors'}", *networks, *more]


def run(workplace: Path, out: Path, *more: str) -> dict[str, object]:
    evaluate.main(["digits", *arguments(workplace, f"--out={out}", *more)])
    written: dict[str, object] = json.loads((out / "evaluation.json").read_text())
    return written


def evaluate_folder(workplace: Path, out: Path, images: Path, *more: str) -> dict[str, object]:
    given = [argument for argument in arguments(workplace) if not argument.startswith("--checkpoint")]
    evaluate.main(["digits", *given, f"--images={images}", f"--out={out}", *more])
    written: dict[str, object] = json.loads((out / "evaluation.json").read_text())
    return written


def test_a_folder_has_the_figures_of_the_checkpoint_that_drew_it(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--num-steps", "2", "--guidance-scale", "2", "--guidance-stop", "7", "--seed", "5"]
    drawn = run(workplace, tmp_path / "drawn", "--num-images", "100", *options)
    assert (tmp_path / "drawn" / "evaluation.md").read_text().strip() in capsys.readouterr().out
    guidance = {"scale": 2.0, "start": 2, "stop": 7}
    assert drawn["options"] == {"sampler": "ddpm", "num_steps": 2, "guidance": guidance}
    assert drawn["weights_sha256"] == load(workplace / "tiny.safetensors").weights_sha256
    for name in ("confusion.png", "nearest.png"):
        with Image.open(tmp_path / "drawn" / name) as image:
            assert min(image.size) > 100
    for form in ("png", "idx"):
        made = tmp_path / form
        given = [f"--checkpoint={workplace / 'tiny.safetensors'}", f"--out={made}", "--count=100"]
        make_dataset.main([*given, f"--format={form}", *options])
        read = evaluate_folder(workplace, tmp_path / f"read {form}", made)
        assert read.pop("images") == form
        for name in ("frechet", "frechet_ratio"):  # a sum in another order
            assert read.pop(name) == pytest.approx(drawn[name], rel=1e-9)
        assert read == {name: value for name, value in drawn.items() if name in read}
        assert len(read) == len(drawn) - 2
    (made / "dataset.json").unlink()
    unknown = evaluate_folder(workplace, tmp_path / "unknown", made)
    assert "options" not in unknown
    assert unknown["judge"] == drawn["judge"]


def test_a_folder_is_evaluated_by_as_many_of_each_digit(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"--checkpoint={workplace / 'tiny.safetensors'}", "--num-steps=1"]
    make_dataset.main([*given, f"--out={tmp_path / 'large'}", "--count=125", "--format=png"])
    make_dataset.main([*given, f"--out={tmp_path / 'small'}", "--count=100"])
    large, small = (evaluate_folder(workplace, tmp_path / f"of {n}", tmp_path / n) for n in ("large", "small"))
    assert "the first 12 of each digit, of 125 images" in capsys.readouterr().out
    assert (large["num_images"], small["num_images"]) == (120, 100)
    asked = evaluate_folder(workplace, tmp_path / "asked", tmp_path / "large", "--num-images=100")
    assert {**asked, "images": "small"} == small


@pytest.mark.parametrize("command", [["fog"], ["clip"], ["synthetic", "set"]], ids=" ".join)
@pytest.mark.parametrize("out", ["figures", "figures.txt", "folder.png", "folder.json"])
def test_where_the_answer_cannot_be_written_nothing_is_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str], out: str
) -> None:
    for name in ("folder.png", "folder.json"):
        (tmp_path / name).mkdir()
    with pytest.raises(SystemExit) as exit_:
        evaluate.main([*command, f"--out={tmp_path / out}"])
    assert exit_.value.code == 2
    assert "does not end in" in (said := capsys.readouterr().err) or "is a folder" in said


@pytest.mark.parametrize("option", ["--seed=0", "--batch-size=64", "--guidance-scale=2", "--compile"])
def test_an_option_that_images_which_lie_there_cannot_heed_is_refused_also_at_its_default(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        evaluate_folder(workplace, tmp_path, tmp_path, option)
    assert exit_.value.code == 2
    assert f"leave out {option.partition('=')[0]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (["--num-images", "105"], "multiple of 10"),
        (["--num-images", "50"], "100 to"),
        (["--split", "train"], "invalid choice"),
        (["--judge", "nowhere.safetensors"], "cannot be read"),
        (["--checkpoint", "nowhere.safetensors"], "cannot be read"),
        (["--images", "nowhere"], "drawn already: leave out --checkpoint"),
        (["--num-images", "50000"], "100 to 49000"),
        (["--num-images", "100", "--out", "/proc/none"], "No such file"),
        (["--data-dir", "nowhere"], "no MNIST files"),
    ],
)
def test_a_wrong_argument_is_one_sentence_and_status_2(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, wrong: list[str], reason: str
) -> None:
    monkeypatch.setattr("torchvision.datasets.MNIST", lambda *args, **options: (_ for _ in ()).throw(OSError("none")))
    with pytest.raises(SystemExit) as exit_:
        evaluate.main(["digits", *arguments(workplace, *wrong)])
    assert exit_.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert reason in sentence


def test_the_fog_is_drawn_and_said(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [f"--data-dir={workplace / 'data'}", f"--checkpoint={workplace / 'tiny.safetensors'}"]
    evaluate.main(["fog", *given, f"--judge={workplace / 'fog_judge.safetensors'}", f"--out={tmp_path / 'fog.png'}"])
    said = [line for line in capsys.readouterr().out.splitlines() if "lost" in line]
    assert [line[:2] for line in said] == [f"{digit}:" for digit in range(10)]
    content = json.loads((tmp_path / "fog.json").read_text())
    for lines in (content["recognised"], content["told"]):
        assert [len(line) for line in lines] == [len(content["t"])] * 10
    with Image.open(tmp_path / "fog.png") as image:
        assert min(image.size) > 100


def test_clip_judges_beside_the_others_where_it_is_asked(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("open_clip")
    written = run(workplace, tmp_path / "drawn", "--num-images", "100", "--num-steps", "2", "--clip")
    assert set(written["clip"]) == {"model", "weights_sha256", "drawn", "real"}  # type: ignore[call-overload]
    assert "| CLIP embedded: clear rather than noisy | " in capsys.readouterr().out
    given = [a for a in arguments(workplace) if not a.startswith(("--judge", "--extractor"))]
    evaluate.main(["clip", *given, "--num-steps=3", "--num-images=10", f"--out={tmp_path / 'clip.png'}"])
    assert len([line for line in capsys.readouterr().out.splitlines() if "at t = 10," in line]) == 3
    with Image.open(tmp_path / "clip.png") as image:
        assert min(image.size) > 100
    content = json.loads((tmp_path / "clip.json").read_text())
    assert (content["options"]["num_steps"], content["num_images"], content["split"]) == (3, 10, "test")
    assert content["weights_sha256"] == load(workplace / "tiny.safetensors").weights_sha256
    assert content["clip"] == {name: written["clip"][name] for name in ("model", "weights_sha256")}  # type: ignore[index]
    assert [len(lines["drawn"]) for lines in content["scores"].values()] == [len(content["t"])] * 3


def test_a_clip_that_is_not_there_is_said_before_anything_is_drawn(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("open_clip")
    with pytest.raises(SystemExit) as exit_:
        run(workplace, tmp_path, "--clip", "nowhere")
    assert exit_.value.code == 2
    said = capsys.readouterr()
    assert "no CLIP model 'nowhere'" in said.err
    assert said.out == ""


def test_what_a_drawn_set_teaches_stands_beside_what_real_digits_teach(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifier_training, "BATCH_SIZE", 8)
    drawing = [f"--checkpoint={workplace / 'tiny.safetensors'}", "--num-steps=1", "--count=100"]
    make_dataset.main([f"--out={tmp_path / 'set'}", *drawing])
    given = [f"--data-dir={workplace / 'data'}", "--epochs=3", f"--out={tmp_path / 'learned.json'}"]
    evaluate.main(["synthetic", str(tmp_path / "set"), *given])
    drawn, real = [line for line in capsys.readouterr().out.splitlines() if line.startswith("learned from")]
    assert drawn.startswith("learned from 100 drawn digits: ")
    assert real.startswith(f"learned from {NUM_IMAGES - NUM_VALIDATION} real digits: ")
    written = json.loads((tmp_path / "learned.json").read_text())
    assert f"{written['drawn']['accuracy']:.2%}" in drawn
    assert written["drawn_with"]["options"]["num_steps"] == 1
    assert float(real.split()[5].rstrip("%")) > 2 * float(drawn.split()[5].rstrip("%"))


def test_a_classifier_is_trained_and_found_again(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifier_training, "BATCH_SIZE", 8)
    out = tmp_path / "extractor.safetensors"
    train_classifiers.main(["extractor", f"--data-dir={workplace / 'data'}", f"--out={out}", "--epochs", "2"])
    trained = load_classifier("extractor", out)
    assert f"{trained.facts['validation_accuracy']:.2%} of the validation digits" in capsys.readouterr().out
    assert (trained.facts["num_test"], trained.facts["epochs"]) == (NUM_IMAGES, 2)


@pytest.mark.parametrize("kind", classifier_training.RECIPES)
def test_what_ships_says_that_it_was_trained_by_the_recipe(kind: str) -> None:
    assert classifier_training.RECIPES[kind].items() <= load_classifier(kind).facts.items()


@pytest.mark.parametrize(
    "wrong",
    [[], ["critic"], ["judge", "--epochs", "many"], ["judge", "--data-dir", "nowhere"], ["judge", "--out", "x"]],
)
def test_a_wrong_argument_of_the_training_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, wrong: list[str]
) -> None:
    monkeypatch.setattr("torchvision.datasets.MNIST", lambda *args, **options: (_ for _ in ()).throw(OSError("none")))
    with pytest.raises(SystemExit) as exit_:
        train_classifiers.main(wrong)
    assert exit_.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["--help"], ["fog", "--help"], ["fog", "--out=fog.png", "--checkpoint=missing"]])
def test_what_needs_no_distances_needs_none_of_their_packages(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        "sys.modules['torchmetrics'] = None\n"
        "from scripts import evaluate, ship\n"
        f"evaluate.main({arguments})"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == (0 if "--help" in arguments else 2)
    assert len(ended.stderr.splitlines()) == ended.returncode // 2


def test_without_the_packages_of_distances_a_sentence_says_what_to_install() -> None:
    script = "import sys\nsys.modules['torchmetrics'] = None\nfrom scripts import evaluate\nevaluate.main(['digits'])"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "torchmetrics is not installed. Install with: pip install -e '.[evaluate]'\n"


@pytest.mark.parametrize("command", [["digits"], ["fog", "--out=fog.png"], ["clip", "--out=clip.png"]], ids=" ".join)
def test_without_matplotlib_nothing_is_drawn_that_could_not_be_shown(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("samples_of_checkpoint", "evaluate_digits", "evaluate_fog", "evaluate_clip"):
        monkeypatch.setattr(evaluate, name, lambda *_: pytest.fail("begun"))
    with pytest.raises(SystemExit) as exit_:
        evaluate.main(command)
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "matplotlib is not installed. Install with: pip install -e '.[evaluate]'\n"


def test_too_few_images_for_a_distance_are_said_in_the_output_and_in_every_file(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "FEWEST_IMAGES", 1_000)
    written = run(workplace, tmp_path, "--num-images=110", "--num-steps=1")
    note = "Too few images for a Fréchet distance: 110, at least 1,000 needed."
    assert note in capsys.readouterr().out.splitlines()
    assert note in (tmp_path / "evaluation.md").read_text().splitlines()
    assert (written["notes"], written["frechet"], written["frechet_ratio"]) == ([note], None, None)
    assert tables.as_run("small", tables.read_evaluation(tmp_path))[7] == "-"


def test_data_that_is_missing_is_noticed_before_anything_is_compiled(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchvision.datasets.MNIST", lambda *args, **options: (_ for _ in ()).throw(OSError("none")))
    monkeypatch.setattr(drawing, "compiled_step", lambda *_: pytest.fail("compiled"))
    with pytest.raises(SystemExit):
        evaluate.main(["digits", *arguments(workplace, "--compile", "--data-dir=nowhere")])
    assert "no MNIST files" in capsys.readouterr().err
