import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from model import checkpoint
from model.checkpoint import CheckpointConfig
from model.pixels import from_pixels
from model.prediction import PredictionConfig
from model.sampler import Guidance
from model.schedule import ScheduleConfig
from scripts import distil, sample, train
from scripts.common.drawing import Drawer, DrawingOptions
from scripts.common.mnist import TRAINING_DATA
from scripts.common.progress import Reporter
from scripts.training import distillation
from scripts.training.distillation import IMAGE_SEED
from scripts.training.run import Run, exclusive
from scripts.training.trainer import EpochResult, Trainer
from tests.scripts.tiny_training import COSINE, NUM_STEPS, trust_idx_files, write_idx_files
from tests.tiny import tiny_unet

DISTILLATION = """
[prediction]
kind = "v"
[distillation]
num_steps = [3, 1]
teacher_steps = 6
num_images = 56
num_held_out = 4
image_weight = 5.0
recognition_weight = 0.2
[distillation.guidance]
scale = 1.5
start = 1
stop = 12
[adversary]
width = 8
lr = 1e-3
gradient_weight = 0.1
"""


@pytest.fixture(autouse=True)
def small_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the teacher generate few images, and accepts the bars in `data` as MNIST. All of its images are kept.

    The images of a tiny teacher are not digits, so a real classifier would leave out most of them.
    """
    monkeypatch.setattr(distillation, "PART_SIZE", 64)
    monkeypatch.setattr(distillation, "_only_readable", lambda images, *args: images)
    write_idx_files(tmp_path / "data")
    trust_idx_files(monkeypatch)


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    recipe = COSINE.replace("scale = 1.3", "scale = 1.0").replace("label_drop = 0.2", "label_drop = 0.0")
    (tmp_path / "tiny.toml").write_text(recipe + DISTILLATION)
    return tmp_path / "tiny.toml"


def save_teacher(path: Path, kind: str = "v", *, large_embeddings: bool = False) -> Path:
    """`large_embeddings` makes the effect of the class, and so of guidance, visible in the images."""
    network = tiny_unet(image_size=28, num_steps=NUM_STEPS, time_dim=8, embed_dim=8)
    if large_embeddings:
        network.class_embed.weight.mul_(10)
    config = CheckpointConfig(
        unet=network.config,
        schedule=ScheduleConfig(kind="cosine", num_steps=NUM_STEPS),
        prediction=PredictionConfig(kind),
        guidance=Guidance(1.5, 1, NUM_STEPS),
        training={"label_drop": 0.1},
    )
    checkpoint.save(path, network, config)
    return path


def run(preset: Path, teacher: Path, out: Path, *more: str) -> None:
    data = preset.parent / "data"
    distil.main(
        [f"--preset={preset}", f"--teacher={teacher}", f"--out={out}", f"--data-dir={data}", "--compile=off", *more]
    )


def test_student_starts_from_the_teacher_and_stores_its_numbers_of_steps(preset: Path, tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher.safetensors")
    run(preset, teacher, tmp_path / "run")
    student = checkpoint.load(tmp_path / "run" / "model.safetensors")
    assert (student.config.samplers, student.config.steps, student.config.guidable) == (("ddim",), (3, 1), False)
    images = f"56 images of the weights {checkpoint.load(teacher).weights_sha256}, guided by 1.5 at t = 1 to 12"
    assert student.config.training["data"] == f"{images}, and {TRAINING_DATA}"
    before, after = (loaded.network.state_dict() for loaded in (checkpoint.load(teacher), student))
    moved = [torch.nn.functional.cosine_similarity(before[n].flatten(), after[n].flatten(), dim=0) for n in before]
    assert 0.5 < torch.stack(moved).mean() < 0.99999


def test_student_is_closer_to_the_images_than_the_teacher_with_the_same_steps(preset: Path, tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher.safetensors", large_embeddings=True)
    # The data is other images than those of this teacher, so the adversary must count little.
    text = preset.read_text().replace("image_weight = 5.0", "image_weight = 1000.0")
    preset.write_text(text.replace("num_images = 56", "num_images = 512"))
    run(preset, teacher, tmp_path / "run")
    last = max((tmp_path / "run" / "teacher").iterdir())
    images, index = load_file(last)["images"], torch.arange(512, 576)  # images that are not in the training set
    for num_steps in (3, 1):
        options = DrawingOptions("ddim", num_steps, Guidance())
        distances = []
        for path in (tmp_path / "run" / "model.safetensors", teacher):
            with Reporter() as reporter:
                x_0 = Drawer(checkpoint.load(path)).draw(index % 10, index, options, reporter, seed=IMAGE_SEED)
            distances.append((x_0 - from_pixels(images)).square().mean().item())
        student, itself = distances
        assert student < 0.7 * itself, num_steps


def test_time_limit_during_the_images_of_the_teacher_is_reported_and_the_run_resumes(
    preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = save_teacher(tmp_path / "teacher.safetensors")
    run(preset, teacher, tmp_path / "run", "--time-limit=0.0000001")
    assert "time limit reached before all images were generated" in capsys.readouterr().out
    assert not (tmp_path / "run" / "model.safetensors").exists()
    run(preset, teacher, tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_folder_in_which_another_process_trains_is_refused_unchanged(
    preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, teacher = tmp_path / "run", save_teacher(tmp_path / "teacher.safetensors")
    with exclusive(out), pytest.raises(SystemExit):
        run(preset, teacher, out)
    assert capsys.readouterr().err == f"distil: another process trains in {out}. Use another --out folder\n"
    assert list(out.iterdir()) == []


def test_sampling_uses_the_steps_and_sampler_of_the_student(
    preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(preset, save_teacher(tmp_path / "teacher.safetensors"), tmp_path / "run", "--epochs=1")
    drawing = [f"--checkpoint={tmp_path / 'run' / 'model.safetensors'}", "--digit=3", "--seed=1"]
    sample.main([*drawing, f"--out={tmp_path / 'own.png'}"])
    sample.main([*drawing, f"--out={tmp_path / 'expected.png'}", "--num-steps=3", "--sampler=ddim"])
    sample.main([*drawing, f"--out={tmp_path / 'one.png'}", "--num-steps=1"])
    own, expected, one = ((tmp_path / f"{name}.png").read_bytes() for name in ("own", "expected", "one"))
    assert own == expected != one
    for wrong in ("--num-steps=2", "--sampler=ddpm", "--guidance-scale=2"):
        with pytest.raises(SystemExit):
            sample.main([*drawing, f"--out={tmp_path / 'wrong.png'}", wrong])
        assert "this checkpoint" in capsys.readouterr().err


def test_resumed_distillation_equals_an_uninterrupted_run(
    preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = save_teacher(tmp_path / "teacher.safetensors")
    run(preset, teacher, tmp_path / "whole")
    record = Run.record

    def stop_after_the_first(self: Run, trainer: Trainer, result: EpochResult) -> bool:
        record(self, trainer, result)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Run, "record", stop_after_the_first)
        run(preset, teacher, tmp_path / "parts")
    run(preset, teacher, tmp_path / "parts")
    assert "; epochs done: 1\n" in capsys.readouterr().out
    whole, parts = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def test_student_has_the_network_and_the_prediction_of_its_teacher(preset: Path, tmp_path: Path) -> None:
    """The preset has the widths 8 and 16, and predicts v."""
    network = tiny_unet(image_size=28, num_steps=NUM_STEPS, widths=(8,))
    config = CheckpointConfig(
        network.config,
        ScheduleConfig("linear", NUM_STEPS, 0.01, 0.5),
        prediction=PredictionConfig("edm"),
        training={"label_drop": 0.1},
    )
    checkpoint.save(tmp_path / "teacher.safetensors", network, config)
    run(preset, tmp_path / "teacher.safetensors", tmp_path / "run", "--epochs=1")
    student = checkpoint.load(tmp_path / "run" / "model.safetensors").config
    assert (student.unet, student.schedule, student.prediction) == (config.unet, config.schedule, config.prediction)


def test_teacher_that_predicts_noise_gives_a_one_line_error(
    preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run(preset, save_teacher(tmp_path / "teacher.safetensors", "eps"), tmp_path / "run")
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "distillation does not support prediction.kind eps. Use v or edm" in line


def test_teacher_that_cannot_generate_the_images_gives_a_one_line_error(
    preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = checkpoint.load(save_teacher(tmp_path / "teacher.safetensors"))
    for change, expected in (
        ({"steps": (3,), "samplers": ("ddim",), "guidance": Guidance()}, "the teacher must permit the sampler dpmpp"),
        ({"training": {}, "guidance": Guidance()}, "does not support guidance"),
    ):
        teacher = tmp_path / "other.safetensors"
        checkpoint.save(teacher, loaded.network, dataclasses.replace(loaded.config, **change))
        with pytest.raises(SystemExit) as exit_:
            run(preset, teacher, tmp_path / "run")
        assert exit_.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert expected in line


def test_train_rejects_a_preset_for_distillation(
    preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        train.main([f"--preset={preset}", f"--out={tmp_path / 'run'}"])
    assert exit_.value.code == 2
    assert "is for distillation. Use it with scripts.distil" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("scale = 1.0", "scale = 1.5", "distillation needs label_drop = 0"),
        ("label_drop = 0.0", "label_drop = 0.1", "distillation needs label_drop = 0"),
        ("label_drop = 0.0", "label_drop = 0.0\nmin_loss_weight = 0.1", "distillation needs min_loss_weight = 0"),
        ("label_drop = 0.0", "label_drop = 0.0\novershoot_weight = 0.1", "distillation needs min_loss_weight = 0"),
        ("teacher_steps = 6", "teacher_steps = 50", "must be at most schedule.num_steps"),
        ("num_images = 56", "num_images = 5", "must be at least batch_size"),
        ("num_steps = [3, 1]", "num_steps = []", "distillation.num_steps: "),
        ("num_steps = [3, 1]", "num_steps = 3", "distillation.num_steps: "),
        ("num_steps = [3, 1]", "num_steps = [3, 3]", "each number of steps must occur once"),
        ("[adversary]", "[adversarial]", "adversarial: "),
    ],
)
def test_invalid_distillation_recipe_gives_a_one_line_error(
    preset: Path, tmp_path: Path, before: str, after: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = preset.read_text()
    assert before in text
    preset.write_text(text.replace(before, after))
    with pytest.raises(SystemExit) as exit_:
        run(preset, save_teacher(tmp_path / "teacher.safetensors"), tmp_path / "run")
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


def test_data_of_other_classes_than_the_teachers_gives_a_one_line_error(
    preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cat", "dog"):
        for number in range(3):
            pixels = np.random.default_rng(number).integers(0, 256, (28, 28), dtype=np.uint8)
            (tmp_path / "pets" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "pets" / name / f"{number}.png")
    teacher = save_teacher(tmp_path / "teacher.safetensors")
    with pytest.raises(SystemExit) as exit_:
        run(preset, teacher, tmp_path / "run", f"--data={tmp_path / 'pets'}")
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the teacher generates 10 classes of 1x28x28 images, but the data has 2 classes of 1x28x28 images" in line


@pytest.mark.parametrize(
    ("preset_name", "expected"),
    [("default", "no [distillation] table"), ("baseline", "no [distillation] table"), ("nowhere", "unknown preset")],
)
def test_preset_without_distillation_gives_a_one_line_error(
    tmp_path: Path, preset_name: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        distil.main([f"--preset={preset_name}", f"--out={tmp_path / 'run'}"])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


def test_too_few_readable_images_of_the_teacher_give_a_one_line_error(
    preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distillation, "_only_readable", lambda images, *args: images.rows(slice(11)))
    with pytest.raises(SystemExit) as exit_:
        run(preset, save_teacher(tmp_path / "teacher.safetensors"), tmp_path / "run")
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "only 11 images of the teacher can be read" in line


def test_image_size_without_data_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        distil.main([f"--out={tmp_path / 'run'}", "--image-size=32"])
    assert exit_.value.code == 2
    assert "--image-size needs --data" in capsys.readouterr().err
