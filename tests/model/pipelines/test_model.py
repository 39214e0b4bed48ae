"""Tests of the specification and the plans of a pipeline. The paths are compared with the loop of `sample`."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.checkpoint import CheckpointError
from model.pipelines.folder import load_pipeline
from model.pipelines.model import PipelineModel
from model.pipelines.step import PipelineState
from model.sampler import sample
from model.schedule import Schedule
from model.spec import QUALITIES, Sampler
from model.step import Rows
from tests.pipelines import write_pipeline

with warnings.catch_warnings():  # the dependencies of diffusers raise warnings
    warnings.simplefilter("ignore")
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of diffusers
CPU = torch.device("cpu")


def loaded(folder: Path, scheduler: Any = None, null_label: int | None = None, **network: Any) -> PipelineModel:
    write_pipeline(folder, scheduler, **network)
    return PipelineModel(load_pipeline(folder), null_label)


@pytest.mark.parametrize(
    ("scheduler", "samplers", "default"),
    [
        (DDPMScheduler(), ("ddpm", "ddim", "dpmpp", "euler"), 100),
        (DPMSolverMultistepScheduler(), ("dpmpp", "ddpm", "ddim", "euler"), 100),
        (EulerDiscreteScheduler(timestep_spacing="leading"), ("euler", "ddpm", "ddim", "dpmpp"), 100),
        (DPMSolverMultistepScheduler(num_train_timesteps=60), ("dpmpp", "ddpm", "ddim", "euler"), 59),
        (DDPMScheduler(num_train_timesteps=1), ("ddpm", "ddim", "dpmpp", "euler"), 1),
    ],
)
def test_own_scheduler_is_the_first_sampler_and_the_default_and_the_qualities_have_a_plan(
    tmp_path: Path, scheduler: Any, samplers: tuple[Sampler, ...], default: int
) -> None:
    model = loaded(tmp_path, scheduler)
    spec = model.spec
    assert (spec.samplers, spec.default_steps) == (samplers, default)
    assert spec.max_steps == scheduler.config.num_train_timesteps
    for quality in QUALITIES:
        assert model.plan(*spec.setting_of(quality)).num_steps == spec.setting_of(quality).num_steps


def test_nearest_number_of_steps_is_the_next_lower_one_with_a_plan(tmp_path: Path) -> None:
    spec = loaded(tmp_path, DDPMScheduler(timestep_spacing="trailing")).spec
    assert not spec.has_plan("ddpm", 61)
    assert (spec.nearest_steps("ddpm", 61), spec.nearest_steps("ddpm", 60)) == (60, 60)


def test_schedule_has_the_noise_levels_of_diffusers_one_timestep_later(tmp_path: Path) -> None:
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    schedule = loaded(tmp_path, scheduler).schedule
    assert schedule.alpha_bar[0] == 1
    assert torch.allclose(schedule.alpha_bar[1:].float(), scheduler.alphas_cumprod, rtol=1e-4)


def test_zero_terminal_snr_is_possible(tmp_path: Path) -> None:
    options = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    model = loaded(tmp_path, DDIMScheduler(**options))
    assert 0 < model.schedule.alpha_bar[-1] < 1e-60
    assert model.plan("ddim", 1, (1000, 500, 0)).rows.isfinite()[:, :-2].all()


def test_null_label_is_no_class(tmp_path: Path) -> None:
    write_pipeline(tmp_path, num_classes=3)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": {"0": "none", "1": "cat", "2": "dog"}}))
    model = PipelineModel(load_pipeline(tmp_path), null_label=0)
    assert (model.spec.class_names, model.spec.guidable) == (("cat", "dog"), True)
    assert model.step(CPU, torch.float32).labels.tolist() == [1, 2, 0]


@pytest.mark.parametrize(("num_classes", "null_label"), [(None, 0), (3, 3), (3, -1), (1, 0)])
def test_null_label_that_the_network_does_not_have_is_refused(
    tmp_path: Path, num_classes: int | None, null_label: int
) -> None:
    write_pipeline(tmp_path, num_classes=num_classes)
    with pytest.raises(CheckpointError, match=f"the label {null_label} cannot mean 'no class'"):
        PipelineModel(load_pipeline(tmp_path), null_label)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat", "dog"], "id2label must have a name for each label from 0 to 1"),
        ({"0": "cat"}, "id2label must have a name for each label from 0 to 1"),
        ({"0": "cat", "1": "cat"}, "id2label is not valid: class names must differ"),
        ({"0": "cat", "1": "\n"}, "id2label is not valid: class names must be printable"),
        ({"0": None, "1": {"a": 1}}, "id2label is not valid: class names must be texts"),
    ],
)
def test_invalid_names_of_classes_are_refused(tmp_path: Path, names: Any, message: str) -> None:
    write_pipeline(tmp_path, num_classes=2)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": names}))
    with pytest.raises(CheckpointError, match=message):
        load_pipeline(tmp_path)


def run_path(model: PipelineModel, sampler: Sampler, path: tuple[int, ...], y: int) -> Tensor:
    """Runs the plan of a path with the step program. Returns x_0 (1, C, H, W)."""
    step, plan = model.step(CPU, torch.float32), model.plan(sampler, len(path) - 1, path)
    state = PipelineState.zeros(1, model.image_shape, CPU)
    seed, index = torch.tensor([4]), torch.tensor([0])
    state.seed, state.index = seed, index
    state.x_t = state.noise_of(torch.tensor([0]), torch.tensor([0]), model.image_shape, step.noise_block)
    state.known = state.is_known = None
    zero = torch.tensor([0])
    with torch.inference_mode():
        for k in range(plan.num_steps):
            rows = Rows(zero, torch.tensor([k]), torch.tensor([y]), torch.tensor([1 + k]), zero)
            stepped = step(state, plan.table(CPU), rows)
            state.x_t, state.x_0 = stepped.x_prev, stepped.x_0
    return state.x_0


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp"])
def test_path_is_that_of_the_samplers_of_this_project(tmp_path: Path, sampler: Sampler) -> None:
    model = loaded(tmp_path, num_classes=3)
    path, network = (1000, 700, 300, 100, 0), model.network
    expected = sample(
        lambda x_t, t, y: network(x_t, t - 1, y),
        model.schedule,
        torch.tensor([2]),
        seed=torch.tensor([4]),
        index=torch.tensor([0]),
        image_shape=model.image_shape,
        sampler=sampler,
        timesteps=list(path),
    )
    assert (run_path(model, sampler, path, y=2) - expected).abs().max() < 1e-3


def test_euler_follows_a_path_as_ddim(tmp_path: Path) -> None:
    model, path = loaded(tmp_path), (800, 300, 0)
    assert torch.equal(run_path(model, "euler", path, y=0), run_path(model, "ddim", path, y=0))


def test_timesteps_are_those_of_the_plan(tmp_path: Path) -> None:
    model = loaded(tmp_path, DDIMScheduler())
    assert model.timesteps("ddim", 4) == [751, 501, 251, 1]
    assert model.timesteps("ddpm", 2, (600, 200, 0)) == [600, 200]


def test_schedule_that_the_samplers_cannot_use_is_refused(tmp_path: Path) -> None:
    betas = [0.01, 1e-20, 0.02]
    with pytest.raises(CheckpointError, match="the schedule adds too little noise"):
        loaded(tmp_path, DDPMScheduler(num_train_timesteps=3, trained_betas=betas))


def test_network_that_cannot_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the network cannot run: "):
        loaded(tmp_path, sample_size=15)


def test_pipeline_whose_scheduler_has_no_plan_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"clip_sample_range must be above 0, got -1\.0"):
        loaded(tmp_path, DDPMScheduler(clip_sample_range=-1.0))


def test_schedules_are_equal_if_their_noise_levels_are() -> None:
    one, same, other = (Schedule(torch.tensor([1.0, x], dtype=torch.float64)) for x in (0.5, 0.5, 0.4))
    assert one == same != other
    assert len({one, same, other}) == 2
    assert math.isinf(one.half_log_snr[0])
