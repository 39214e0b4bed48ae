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
def few_paths_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.training.distillation.PART_SIZE", 64)


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    recipe = COSINE.replace("scale = 1.3", "scale = 1.0").replace("label_drop = 0.2", "label_drop = 0.0")
    (tmp_path / "tiny.toml").write_text(recipe + DISTILLATION)
    return tmp_path / "tiny.toml"


def save_teacher(path: Path, kind: str = "v", *, loud: bool = False) -> Path:
    """`loud`: it hears of the digit as of anything else, so that guidance is seen in what it draws."""
    network = tiny_unet(image_size=28, num_steps=NUM_STEPS, time_dim=8, embed_dim=8)
    if loud:
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


def test_the_student_begins_as_its_teacher_and_says_in_how_many_steps_it_draws(preset: Path, tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher.safetensors")
    run(preset, teacher, tmp_path / "run")
    student = checkpoint.load(tmp_path / "run" / "model.safetensors")
    assert (student.config.samplers, student.config.steps, student.config.guidable) == (("ddim",), (3,), False)
    paths = f"56 paths of the weights {checkpoint.load(teacher).weights_sha256}, guided by 1.5 at t = 1 to 12"
    assert student.config.training["data"] == paths
    before, after = (loaded.network.state_dict() for loaded in (checkpoint.load(teacher), student))
    moved = [torch.nn.functional.cosine_similarity(before[n].flatten(), after[n].flatten(), dim=0) for n in before]
    assert 0.5 < torch.stack(moved).mean() < 0.99999


def test_the_student_comes_nearer_to_its_teachers_paths_than_the_teacher_in_as_many_steps(
    preset: Path, tmp_path: Path
) -> None:
    teacher = save_teacher(tmp_path / "teacher.safetensors", loud=True)
    preset.write_text(preset.read_text().replace("num_paths = 56", "num_paths = 960"))
    run(preset, teacher, tmp_path / "run")
    last = max((tmp_path / "run" / "paths").iterdir())
    paths, index = load_file(last), torch.arange(960, 1_024)  # that were not learned from
    options = DrawingOptions("ddim", 3, Guidance())
    distances = []
    for path in (tmp_path / "run" / "model.safetensors", teacher):
        with Reporter() as reporter:
            x_0 = Drawer(checkpoint.load(path)).draw(paths["y"], index, options, reporter, seed=PATH_SEED)
        distances.append((x_0 - paths["states"][:, -1].float()).square().mean().item())
    student, itself = distances
    assert student < 0.7 * itself


def test_time_that_runs_out_among_the_paths_is_said_and_they_are_gone_on_with(
    preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = save_teacher(tmp_path / "teacher.safetensors")
    run(preset, teacher, tmp_path / "run", "--time-limit=0.0000001")
    assert "not all paths" in capsys.readouterr().out
    assert not (tmp_path / "run" / "model.safetensors").exists()
    run(preset, teacher, tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_the_student_is_drawn_with_as_it_says(preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(preset, save_teacher(tmp_path / "teacher.safetensors"), tmp_path / "run", "--epochs=1")
    drawing = [f"--checkpoint={tmp_path / 'run' / 'model.safetensors'}", "--digit=3", "--seed=1"]
    sample.main([*drawing, f"--out={tmp_path / 'own.png'}"])
    sample.main([*drawing, f"--out={tmp_path / 'said.png'}", "--num-steps=3", "--sampler=ddim"])
    assert (tmp_path / "own.png").read_bytes() == (tmp_path / "said.png").read_bytes()
    for wrong in ("--num-steps=2", "--sampler=ddpm", "--guidance-scale=2"):
        with pytest.raises(SystemExit):
            sample.main([*drawing, f"--out={tmp_path / 'wrong.png'}", wrong])
        assert "this checkpoint" in capsys.readouterr().err


def test_started_again_it_goes_on_as_if_it_had_never_stopped(
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
    assert "going on after epoch 1" in capsys.readouterr().out
    whole, parts = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


@pytest.mark.parametrize("kind", ["eps", "edm"])
def test_a_teacher_of_another_kind_is_one_sentence(
    preset: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run(preset, save_teacher(tmp_path / "teacher.safetensors", kind), tmp_path / "run")
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the student begins as its teacher" in line
    assert kind in line


def test_a_teacher_that_may_not_draw_the_paths_is_one_sentence(
    preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = checkpoint.load(save_teacher(tmp_path / "teacher.safetensors"))
    for change, said in (
        ({"steps": (3,), "samplers": ("ddim",), "guidance": Guidance()}, "does not permit"),
        ({"training": {}, "guidance": Guidance()}, "cannot be guided"),
    ):
        teacher = tmp_path / "other.safetensors"
        checkpoint.save(teacher, loaded.network, dataclasses.replace(loaded.config, **change))
        with pytest.raises(SystemExit) as exit_:
            run(preset, teacher, tmp_path / "run")
        assert exit_.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line


def test_a_student_is_not_trained_on_images(preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        train.main([f"--preset={preset}", f"--out={tmp_path / 'run'}"])
    assert exit_.value.code == 2
    assert "that is what scripts.distil does" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('kind = "v"', 'kind = "eps"', "a student cannot predict eps"),
        ("scale = 1.0", "scale = 1.5", "a student drops no label"),
        ("label_drop = 0.0", "label_drop = 0.1", "a student drops no label"),
        ("teacher_steps = 6", "teacher_steps = 50", "more steps than the schedule"),
        ("num_paths = 56", "num_paths = 5", "must fill a batch"),
    ],
)
def test_a_recipe_that_no_student_can_follow_is_one_sentence(
    preset: Path, tmp_path: Path, before: str, after: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = preset.read_text()
    assert before in text
    preset.write_text(text.replace(before, after))
    with pytest.raises(SystemExit) as exit_:
        run(preset, save_teacher(tmp_path / "teacher.safetensors"), tmp_path / "run")
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize("preset_name", ["default", "baseline", "nowhere"])
def test_a_recipe_that_distils_nothing_is_one_sentence(
    tmp_path: Path, preset_name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        distil.main([f"--preset={preset_name}", f"--out={tmp_path}"])
    assert exit_.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
