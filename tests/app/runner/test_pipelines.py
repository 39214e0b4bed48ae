"""Tests of the runner with pipelines of diffusers. Their images are compared with those of diffusers itself."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.engine.interface import OutOfMemoryError, RunnerError
from app.engine.job import ImageKey, Job, JobRequest, Options, StepRows, Trajectory
from app.runner.runner import Runner
from app.runner.threads import ComputeThreads
from model.checkpoint import Checkpoint
from model.pipelines.folder import load_pipeline
from model.pipelines.model import PipelineModel
from tests.app.runner.rows import CPU
from tests.model.pipelines.test_step import BAD_SIZES
from tests.pipelines import write_pipeline

with warnings.catch_warnings():  # the dependencies of diffusers raise warnings
    warnings.simplefilter("ignore")
    from diffusers import (
        DDIMScheduler,
        DDPMPipeline,
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
    )

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of diffusers
SEED, COUNT = 20, 3
# A network that is compiled quickly.
ONE_LEVEL = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
OFFSET = {"set_alpha_to_one": False, "steps_offset": 1}  # the last step does not end at x_0


def rows_of(options: Options, count: int = 1, **more: Any) -> list[Trajectory]:
    return Job(JobRequest(options, count, **more)).unfinished


def finish(runner: Runner, rows: list[Trajectory]) -> list[np.ndarray[Any, Any]]:
    """Runs all rows in one batch until they are finished. Rows with fewer steps leave the batch earlier."""
    while running := [row for row in rows if row.steps_left]:
        assert runner.step(StepRows.of(running)) == []
        for row in running:
            row.step += 1
    images = [image for image in runner.pixels(rows).wait() if image is not None]
    runner.release(rows)
    return images


def new_runner(*folders: Path, threads: int = 2, null_label: int | None = None) -> Runner:
    models = {folder.name: PipelineModel(load_pipeline(folder), null_label) for folder in folders}
    return Runner(models, CPU, torch.bfloat16, ComputeThreads((2,)), threads_of_pipelines=threads)


@pytest.mark.parametrize(
    ("kind", "scheduler", "sampler"),
    [
        ("DDPMPipeline", DDPMScheduler(clip_sample=False, prediction_type="v_prediction"), "ddpm"),
        ("DDPMPipeline", DDPMScheduler(variance_type="fixed_large"), "ddpm"),
        ("DDIMPipeline", DDIMScheduler(prediction_type="v_prediction", clip_sample=False, **OFFSET), "ddim"),
        ("DDPMPipeline", DPMSolverMultistepScheduler(prediction_type="v_prediction"), "dpmpp"),
    ],
)
def test_images_with_the_noise_of_torch_are_those_of_the_pipeline(
    kind: str, scheduler: Any, sampler: Any, tmp_path: Path
) -> None:
    theirs = write_pipeline(tmp_path / "own", scheduler, kind=kind)
    generators = [torch.Generator("cpu").manual_seed(SEED + index) for index in range(COUNT)]
    expected = theirs(COUNT, generator=generators, num_inference_steps=10, output_type="np").images  # (3, H, W, C)
    rows = rows_of(Options(0, SEED, 10, sampler, 1.0, "own", noise="torch"), COUNT)
    ours = np.stack(finish(new_runner(tmp_path / "own"), rows))
    assert (ours == (255 * expected).round()).mean() >= 0.999
    assert np.abs(ours - 255 * expected).max() < 2


def test_another_scheduler_gives_the_images_of_a_pipeline_with_that_scheduler(tmp_path: Path) -> None:
    write_pipeline(tmp_path / "own", DDPMScheduler(prediction_type="v_prediction"))
    theirs = DDPMPipeline.from_pretrained(tmp_path / "own", low_cpu_mem_usage=False)
    theirs.scheduler = EulerDiscreteScheduler.from_config(theirs.scheduler.config)
    generator, scheduler = torch.Generator("cpu").manual_seed(SEED), theirs.scheduler
    scheduler.set_timesteps(12)
    x_t = torch.randn(1, 3, 16, 16, generator=generator) * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = theirs.unet(scheduler.scale_model_input(x_t, t), t).sample
            x_t = scheduler.step(output, t, x_t).prev_sample
    expected = (127.5 * (x_t + 1)).clamp(0, 255).round()[0].permute(1, 2, 0).numpy()
    (ours,) = finish(new_runner(tmp_path / "own"), rows_of(Options(0, SEED, 12, "euler", 1.0, "own", noise="torch")))
    assert (ours == expected).mean() >= 0.999


def mixed_rows(model: str) -> list[Trajectory]:
    """Rows with different samplers, numbers of steps, classes, guidance and noise."""
    return [
        *rows_of(Options(0, 1, 4, "ddpm", 1.0, model)),
        *rows_of(Options(2, 2, 7, "ddim", 3.0, model), 2, guided_steps=range(7)),
        *rows_of(Options(1, 3, 5, "dpmpp", 1.0, model)),
        *rows_of(Options(3, 4, 6, "euler", 1.0, model, noise="torch")),
        *rows_of(Options(3, 5, 6, "ddpm", 1.0, model, noise="torch"), 2),
        *rows_of(Options(1, 6, 1, "ddpm", 1.0, model)),
        *rows_of(Options(1, 7, 2, "euler", 1.0, model, path=(500, 200, 0))),
    ]


@pytest.mark.parametrize(("threads", "sizes"), [(1, {}), (2, {}), (3, {}), (4, {}), (2, BAD_SIZES)])
def test_rows_have_the_same_bytes_in_mixed_batches_as_alone(tmp_path: Path, threads: int, sizes: Any) -> None:
    write_pipeline(tmp_path / "own", DDPMScheduler(), num_classes=5, **sizes)
    runner = new_runner(tmp_path / "own", threads=threads, null_label=4)
    runner.warm_up(lambda: True)
    assert (runner._models["own"].program.call_rows.most == 1) == bool(sizes)
    together = finish(runner, mixed_rows("own"))
    alone = [finish(runner, [row])[0] for row in mixed_rows("own")]
    assert len(together) == len(alone) == 9
    assert all(np.array_equal(one, other) for one, other in zip(together, alone, strict=True))
    assert len({image.tobytes() for image in together}) == len(together)


def test_the_number_of_threads_is_that_of_pipelines_only_in_their_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pipeline(tmp_path / "own")
    runner, seen = new_runner(tmp_path / "own", threads=1), []
    torch.set_num_threads(2)
    model = runner._models["own"]
    step = model.step
    monkeypatch.setattr(model, "step", lambda *given: seen.append(torch.get_num_threads()) or step(*given))
    finish(runner, rows_of(Options(0, 1, 1, "ddpm", 1.0, "own")))
    assert (seen, torch.get_num_threads()) == ([1], 2)


def test_more_rows_than_the_first_slots_keep_their_noise(tmp_path: Path) -> None:
    write_pipeline(tmp_path / "own")
    runner = new_runner(tmp_path / "own")
    options = Options(0, SEED, 3, "ddpm", 1.0, "own", noise="torch")
    early = rows_of(options)
    runner.step(StepRows.of(early))
    early[0].step += 1
    many = finish(runner, [*early, *rows_of(options, 20)])
    assert np.array_equal(many[0], many[1])


def test_failed_step_is_repeated_with_the_same_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pipeline(tmp_path / "own")
    runner = new_runner(tmp_path / "own")
    options = Options(0, SEED, 3, "ddpm", 1.0, "own", noise="torch")
    (expected,) = finish(runner, rows_of(options))
    (row,) = rows_of(options)
    model, step = runner._models["own"], runner._models["own"].step
    for _ in range(3):
        monkeypatch.setattr(model, "step", lambda *_: torch.empty(1 << 50))
        with pytest.raises(OutOfMemoryError):
            runner.step(StepRows.of([row]))
        monkeypatch.setattr(model, "step", step)
        runner.step(StepRows.of([row]))
        row.step += 1
    (image,) = runner.pixels([row]).wait()
    assert np.array_equal(image, expected)


def test_images_of_each_class_and_seed_differ(tmp_path: Path) -> None:
    write_pipeline(tmp_path / "own", num_classes=3)
    keys = (ImageKey(0, 1, 0), ImageKey(1, 1, 0), ImageKey(0, 2, 0), ImageKey(0, 1, 1))
    images = finish(new_runner(tmp_path / "own"), rows_of(Options(0, 1, 3, "ddim", 1.0, "own"), len(keys), images=keys))
    assert len({image.tobytes() for image in images}) == len(keys)


def test_checkpoint_and_pipeline_share_a_step(tmp_path: Path, loaded: Checkpoint) -> None:
    write_pipeline(tmp_path / "own")
    models = {"default": loaded, "own": PipelineModel(load_pipeline(tmp_path / "own"))}
    runner = Runner(models, CPU, torch.float32, ComputeThreads((2,)), threads_of_pipelines=2)
    options = [Options(0, 1, 5, "ddpm", 1.0, "default"), Options(0, 1, 4, "ddpm", 1.0, "own")]
    together = finish(runner, [row for each in options for row in rows_of(each)])
    alone = [finish(runner, rows_of(each))[0] for each in options]
    assert all(np.array_equal(one, other) for one, other in zip(together, alone, strict=True))


def test_probe_image_shows_a_network_that_computes_something_else(tmp_path: Path) -> None:
    write_pipeline(tmp_path / "own")
    runner = new_runner(tmp_path / "own")
    runner.check()
    with torch.no_grad():
        runner._models["own"].program.network.unet.conv_out.bias.add_(1.0)  # type: ignore[union-attr]
    with pytest.raises(RunnerError, match="this machine computes wrong images"):
        runner.check()


def test_measured_times_are_those_of_whole_calls(tmp_path: Path) -> None:
    write_pipeline(tmp_path / "own")
    times = new_runner(tmp_path / "own").warm_up(lambda: False).of("own")
    assert times.seconds(1) == times.seconds(4)
    assert times.seconds(64) == pytest.approx(16 * times.seconds(4))


@pytest.mark.slow  # it compiles for 40 s
def test_compiled_network_gives_the_images_of_diffusers_in_any_batch(tmp_path: Path) -> None:
    scheduler = DDPMScheduler(clip_sample=False, prediction_type="v_prediction")
    theirs = write_pipeline(tmp_path / "own", scheduler, **ONE_LEVEL)
    generator = torch.Generator("cpu").manual_seed(SEED)
    (expected,) = theirs(generator=generator, num_inference_steps=6, output_type="np").images
    runner = new_runner(tmp_path / "own")
    assert runner.compile(tmp_path / "cache", must=True)
    assert runner.models["own"].compiled
    options = [Options(0, SEED, 6, "ddpm", 1.0, "own", noise="torch"), Options(0, 1, 4, "euler", 1.0, "own")]
    together = finish(runner, [row for each in options for row in rows_of(each, 3)])
    assert (together[0] == (255 * expected).round()).mean() >= 0.999
    assert np.array_equal(together[0], finish(runner, rows_of(options[0]))[0])
