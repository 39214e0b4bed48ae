"""Paths: the timesteps that a process visits. `plan_through` in model/sampler.py computes the steps along a path.

This module does not import torch.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

from model.schedule import Schedule
from model.spec import Sampler


def timesteps_of(schedule: Schedule, sampler: Sampler, num_steps: int, start: int | None = None) -> list[int]:
    """Returns num_steps + 1 decreasing timesteps from `start` (default: T) to 0.

    They are evenly spaced in log-SNR for dpmpp, and evenly spaced in t for the other samplers. Raises ValueError if
    num_steps is not in 1..start.
    """
    if sampler == "dpmpp":
        return schedule.log_snr_timesteps(num_steps, start)
    return schedule.even_timesteps(num_steps, start)


def timesteps_from(schedule: Schedule, sampler: Sampler, num_steps: int, start: int) -> list[int]:
    """Returns the timesteps from `start` to 0, with steps as long as those of a process of `num_steps` from T to 0.

    The number of steps is round(num_steps * start / T), limited to 1..start.
    """
    count = min(max(round(num_steps * start / schedule.num_steps), 1), start)
    return timesteps_of(schedule, sampler, count, start)


def num_steps_of(path: Sequence[int]) -> int:
    """Returns the number of steps of a sampler along a path. Going up needs no additional step."""
    return sum(t_next < t for t, t_next in pairwise(path))


def timesteps_along(path: Sequence[int]) -> list[int]:
    """Returns the timesteps of a sampler along a path, as in `plan_through`. Raises ValueError for an invalid path."""
    return step_timesteps(decreasing_runs(path))


def step_timesteps(runs: list[list[int]]) -> list[int]:
    """Returns the timestep of each step, and the last timestep of the path."""
    return [*(t for run in runs for t in run[:-1]), runs[-1][-1]]


def decreasing_runs(path: Sequence[int]) -> list[list[int]]:
    """Splits a path where it goes up. Raises ValueError if a part has no step, or if two timesteps are equal."""
    runs = [[path[0]]]
    for t, t_next in pairwise(path):
        if t_next < t:
            runs[-1].append(t_next)
        else:
            runs.append([t_next])
    if any(len(run) < 2 for run in runs):
        raise ValueError(f"a path must go down at its start, at its end and after each step up, got {list(path)}")
    return runs


def noise_above(schedule: Schedule, t_image: int, t: int) -> tuple[float, float]:
    """Returns the signal and the noise of x_t = signal u + noise n, for an image u with the noise level of t_image.

    u is x_0 with noise of the variance (1 - alpha_bar) / alpha_bar at t_image, and n is standard normal noise. x_t then
    has the noise level of t, which must be above t_image.
    """
    alpha_bar = schedule.alpha_bar[t].item()
    gamma = noise_variance(schedule, t) - noise_variance(schedule, t_image)
    return math.sqrt(alpha_bar), math.sqrt(alpha_bar * gamma)


def noise_variance(schedule: Schedule, t: int) -> float:
    """Returns the variance of the noise in x_t / sqrt(alpha_bar_t)."""
    alpha_bar = schedule.alpha_bar[t].item()
    return (1 - alpha_bar) / alpha_bar
