"""Helpers for tests of the real runner on a CPU: rows with different options, and functions that generate images."""

import random
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from app.engine.job import Job, JobRequest, Options, Pixels, StepRows, Trajectory
from app.runner.runner import Runner
from model.checkpoint import Checkpoint
from model.spec import SAMPLERS, Guidance, Sampler

CPU = torch.device("cpu")
GUIDANCE = Guidance(scale=2.0, start=20, stop=80)
GREY_AND_COLOUR = pytest.mark.parametrize("path", ["grey", "colour"], indirect=True)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def new_runner(loaded: Checkpoint, dtype: torch.dtype = torch.float32) -> Runner:
    return Runner({"default": loaded}, CPU, dtype)


def rows_of(
    count: int = 1,
    *,
    digit: int = 3,
    seed: int = 1,
    num_steps: int = 5,
    sampler: Sampler = "ddpm",
    guidance_scale: float = 1.0,
    model: str = "default",
) -> list[Trajectory]:
    return Job(JobRequest(Options(digit, seed, num_steps, sampler, guidance_scale, model), count)).unfinished


def step(runner: Runner, rows: list[Trajectory]) -> list[bool]:
    """Runs one step in the same way as the engine, after setting the guided steps in the same way as the service.

    Returns True for each row whose values are finite.
    """
    for row in rows:
        request = row.job.request
        guided_steps = runner.models[request.options.model].guided_steps_of(request.options)
        row.job.request = replace(request, guided_steps=guided_steps)
        row.job.sizes = row.job.request.sizes
    not_finite = runner.step(StepRows.of(rows))
    for row in rows:
        row.step += 1
    return [row not in not_finite for row in rows]


def draw(runner: Runner, rows: list[Trajectory], max_batch: int = 64, order: int | None = None) -> list[Pixels]:
    """Generates the images of these rows, with at most `max_batch` rows in a step.

    If `order` is given, it is the seed of a random order of the rows in each step.
    """
    shuffle = random.Random(order)
    while left := [row for row in rows if row.steps_left]:
        if order is not None:
            shuffle.shuffle(left)
        assert all(step(runner, left[:max_batch]))
    images = runner.pixels(rows).wait()
    runner.release(rows)
    return images


def equal(left: Iterable[Pixels], right: Iterable[Pixels]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def mixed_rows() -> list[Trajectory]:
    """Returns rows with different digits, seeds, numbers of steps, samplers and guidance scales."""
    choose = random.Random(7)
    jobs = [
        rows_of(
            choose.randint(1, 3),
            digit=choose.randrange(10),
            seed=choose.randrange(2**53),
            num_steps=choose.choice([1, 2, 7, 12]),
            sampler=choose.choice(SAMPLERS),
            guidance_scale=choose.choice([1.0, 1.5, 4.0]),
        )
        for _ in range(12)
    ]
    return [row for rows in jobs for row in rows]


class CountingNetwork:
    """Replaces the network of a runner and counts the evaluations of each call."""

    def __init__(self, runner: Runner) -> None:
        self.rows: list[int] = []
        self._denoise = runner._models["default"].program.denoise
        runner._models["default"].program.denoise = self

    def __call__(self, x: Tensor, c: Tensor) -> Tensor:
        self.rows.append(len(x))
        assert len(x) == len(c)
        eps: Tensor = self._denoise(x, c)
        return eps
