"""Compares the samplers with the schedulers of diffusers, for the same network, timesteps and noise."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from model.noise import normal
from model.sampler import sample
from model.schedule import Schedule, ScheduleConfig
from model.spec import Sampler

with warnings.catch_warnings():  # the dependencies of diffusers raise warnings
    warnings.simplefilter("ignore")
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
    from diffusers.schedulers import scheduling_ddpm

SHAPE = (1, 6, 6)
SEED = torch.tensor([3, 3, 2**53 - 1])
INDEX = torch.tensor([0, 1, 0])
SCHEDULES = {kind: Schedule(ScheduleConfig(kind=kind)) for kind in ("cosine", "linear")}


def eps(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """A smooth function of x_t, t and y instead of a network. The predicted x_0 is clipped in most steps."""
    angle = 0.01 * t + y
    return torch.tanh(x_t) * angle.cos()[:, None, None, None] + 0.3 * x_t.flip(3)


def theirs(scheduler: Any, schedule: Schedule, timesteps: list[int]) -> Tensor:
    """Runs the loop of the diffusers pipelines, starting from our x_T. diffusers counts timesteps from 0."""
    x_t = normal(SEED, INDEX, torch.zeros_like(SEED), SHAPE)
    y = torch.arange(3)
    for t in timesteps[:-1]:
        alpha_bar_t = schedule.alpha_bar[t].float()
        x_0 = (x_t - (1 - alpha_bar_t).sqrt() * eps(x_t, torch.full_like(y, t), y)) / alpha_bar_t.sqrt()
        options = {"use_clipped_model_output": True} if isinstance(scheduler, DDIMScheduler) else {}
        x_t = scheduler.step(x_0.clamp(-1, 1), t - 1, x_t, **options).prev_sample
    return x_t


def ours(schedule: Schedule, sampler: Sampler, num_steps: int) -> Tensor:
    keys = {"seed": SEED, "index": INDEX, "image_shape": SHAPE}
    return sample(eps, schedule, torch.arange(3), sampler=sampler, num_steps=num_steps, **keys)  # type: ignore[arg-type]


def settings(schedule: Schedule) -> dict[str, Any]:
    alpha_bar = schedule.alpha_bar
    betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).numpy()
    return {"num_train_timesteps": 100, "trained_betas": betas, "prediction_type": "sample"}


@pytest.mark.parametrize("num_steps", [100, 30, 7, 1])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_ddpm_equals_diffusers(schedule: Schedule, num_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = DDPMScheduler(**settings(schedule), variance_type="fixed_small", clip_sample=True)
    timesteps = schedule.even_timesteps(num_steps)
    scheduler.set_timesteps(timesteps=[t - 1 for t in timesteps[:-1]])
    draws = iter(range(1, num_steps + 1))

    def our_noise(*args: Any, **kwargs: Any) -> Tensor:
        return normal(SEED, INDEX, torch.full_like(SEED, next(draws)), SHAPE)

    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", our_noise)
    torch.testing.assert_close(
        ours(schedule, "ddpm", num_steps), theirs(scheduler, schedule, timesteps), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("num_steps", [100, 50, 20, 10, 1])  # diffusers needs an integer T / num_steps
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_ddim_equals_diffusers(schedule: Schedule, num_steps: int) -> None:
    scheduler = DDIMScheduler(**settings(schedule), timestep_spacing="trailing", clip_sample=True)
    scheduler.set_timesteps(num_steps)
    timesteps = schedule.even_timesteps(num_steps)
    assert [t - 1 for t in timesteps[:-1]] == scheduler.timesteps.tolist()
    torch.testing.assert_close(
        ours(schedule, "ddim", num_steps), theirs(scheduler, schedule, timesteps), rtol=0, atol=1e-4
    )


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")
@pytest.mark.parametrize("num_steps", [100, 30, 18, 10, 2, 1])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_dpmpp_equals_diffusers(schedule: Schedule, num_steps: int) -> None:
    scheduler = DPMSolverMultistepScheduler(**settings(schedule), final_sigmas_type="zero")
    timesteps = schedule.log_snr_timesteps(num_steps)
    scheduler.set_timesteps(timesteps=[t - 1 for t in timesteps[:-1]])
    torch.testing.assert_close(
        ours(schedule, "dpmpp", num_steps), theirs(scheduler, schedule, timesteps), rtol=0, atol=1e-4
    )
