import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model import checkpoint
from model.checkpoint import CheckpointConfig
from model.prediction import PredictionConfig
from model.sampler import Guidance
from model.schedule import ScheduleConfig
from scripts import distil, sample, train
from scripts.common.drawing import Drawer, DrawingOptions
from scripts.common.progress import Reporter
from scripts.training.distillation import PATH_SEED
from scripts.training.run import Run
from scripts.training.trainer import EpochResult, Trainer
from tests.scripts.tiny_training import COSINE, NUM_STEPS
from tests.tiny import tiny_unet

DISTILLATION = """
[prediction]
kind = "v"
[distillation]
num_steps = 3
teacher_steps = 6
num_paths = 56
num_held_out = 4
[distillation.guidance]
scale = 1.5
start = 1
stop = 12
"""


@pytest.fixture(autouse=True)
def few_paths_per_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.training.distillation.PART_SIZE", 64)


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
    distil.main([f"--preset={preset}", f"--teacher={teacher}", f"--out={out}", "--compile=off", *more])


def test_student_starts_from_the_teacher_and_stores_its_number_of_steps(preset: Path, tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher.safetensors")
    run(preset, teacher, tmp_path / "run")
    student = checkpoint.load(tmp_path / "run" / "model.safetensors")
    assert (student.config.samplers, student.config.steps, student.config.guidable) == (("ddim",), (3,), False)
    paths = f"56 paths of the weights {checkpoint.load(teacher).weights_sha256}, guided by 1.5 at t = 1 to 12"
    assert student.config.training["data"] == paths
    before, after = (loaded.network.state_dict() for loaded in (checkpoint.load(teacher), student))
    moved = [torch.nn.functional.cosine_similarity(before[n].flatten(), after[n].flatten(), dim=0) for n in before]
    assert 0.5 < torch.stack(moved).mean() < 0.99999


def test_student_is_closer_to_the_paths_than_the_teacher_with_the_same_steps(preset: Path, tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher.safetensors", large_embeddings=True)
    preset.write_text(preset.read_text().replace("num_paths = 56", "num_paths = 512"))
    run(preset, teacher, tmp_path / "run")
    last = max((tmp_path / "run" / "paths").iterdir())
    paths, index = load_file(last), torch.arange(512, 576)  # paths that are not in the training set
    options = DrawingOptions("ddim", 3, Guidance())
    distances = []
    for path in (tmp_path / "run" / "model.safetensors", teacher):
        with Reporter() as reporter:
            x_0 = Drawer(checkpoint.load(path)).draw(paths["y"], index, options, reporter, seed=PATH_SEED)
        distances.append((x_0 - paths["states"][:, -1].float()).square().mean().item())
    student, itself = distances
    assert student < 0.7 * itself


def test_time_limit_during_the_paths_is_reported_and_the_run_resumes(
    preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = save_teacher(tmp_path / "teacher.safetensors")
    run(preset, teacher, tmp_path / "run", "--time-limit=0.0000001")
    assert "time limit reached before all paths were generated" in capsys.readouterr().out
    assert not (tmp_path / "run" / "model.safetensors").exists()
    run(preset, teacher, tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_sampling_uses_the_steps_and_sampler_of_the_student(
    preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(preset, save_teacher(tmp_path / "teacher.safetensors"), tmp_path / "run", "--epochs=1")
    drawing = [f"--checkpoint={tmp_path / 'run' / 'model.safetensors'}", "--digit=3", "--seed=1"]
    sample.main([*drawing, f"--out={tmp_path / 'own.png'}"])
    sample.main([*drawing, f"--out={tmp_path / 'expected.png'}", "--num-steps=3", "--sampler=ddim"])
    assert (tmp_path / "own.png").read_bytes() == (tmp_path / "expected.png").read_bytes()
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
    assert "resuming from epoch 1" in capsys.readouterr().out
    whole, parts = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


@pytest.mark.parametrize("kind", ["eps", "edm"])
def test_teacher_with_another_prediction_gives_a_one_line_error(
    preset: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run(preset, save_teacher(tmp_path / "teacher.safetensors", kind), tmp_path / "run")
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the recipe and the teacher differ" in line
    assert kind in line


def test_teacher_that_cannot_generate_the_paths_gives_a_one_line_error(
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
        ('kind = "v"', 'kind = "eps"', "distillation does not support prediction.kind eps"),
        ("scale = 1.0", "scale = 1.5", "distillation needs label_drop = 0"),
        ("label_drop = 0.0", "label_drop = 0.1", "distillation needs label_drop = 0"),
        ("label_drop = 0.0", "label_drop = 0.0\nmin_loss_weight = 0.1", "distillation needs min_loss_weight = 0"),
        ("label_drop = 0.0", "label_drop = 0.0\novershoot_weight = 0.1", "distillation needs min_loss_weight = 0"),
        ("teacher_steps = 6", "teacher_steps = 50", "must be at most schedule.num_steps"),
        ("num_paths = 56", "num_paths = 5", "must be at least batch_size"),
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


@pytest.mark.parametrize("preset_name", ["default", "baseline", "nowhere"])
def test_preset_without_distillation_gives_a_one_line_error(
    tmp_path: Path, preset_name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        distil.main([f"--preset={preset_name}", f"--out={tmp_path}"])
    assert exit_.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
