"""Rows of all tasks for tests of the real runner: generation, sketches, missing pixels, searches and recognition."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from app.engine.interface import ModelInfo
from app.engine.job import Input, Job, JobRequest, Options, Search, StepRows, Trajectory
from app.runner.runner import Runner
from model.inpainting import ClassDistances, inpainting_path, recognition_path
from model.noisy_image import NoisyComparison, comparison_path, noise_levels
from model.paths import noise_above, num_steps_of, timesteps_of
from model.recognition import RECOGNITION_SEED, Recognition, ink_of
from model.recognition import timesteps as recognition_timesteps
from model.spec import SAMPLERS
from tests.app.runner.rows import mixed_rows

NUM_PAIRS = 6

Outcome = tuple[bytes, tuple[tuple[float, ...], ...]]  # the pixels of a row, and its errors in each step


def picture(info: ModelInfo, seed: int) -> np.ndarray:
    """Returns a random image (C, H, W) in [-1, 1]."""
    return np.random.default_rng(seed).uniform(-1, 1, info.image_shape).astype(np.float32)


def mask(info: ModelInfo, seed: int) -> np.ndarray:
    """Returns a random mask (C, H, W) of known pixels. About half of the pixels are known."""
    return np.random.default_rng(seed).random(info.image_shape) < 0.5


def noisy_input(info: ModelInfo, image: np.ndarray, t: int, is_known: np.ndarray | None = None) -> Input:
    """Starts from the forward process at timestep t."""
    return Input(image, *info.schedule.signal_and_noise(t), is_known)


def edit_rows(info: ModelInfo, seed: int, count: int = 1, t: int = 40, scale: float = 1.0) -> list[Trajectory]:
    """Starts from a random image with noise at timestep t."""
    sampler = SAMPLERS[seed % 3]
    path = tuple(timesteps_of(info.schedule, sampler, 4, t))
    options = Options(seed % 10, seed, 4, sampler, scale, path=path)
    start = noisy_input(info, picture(info, seed), t)
    return Job(JobRequest(options, count, guided_steps=info.guided_steps_of(options), input=start)).unfinished


def inpaint_options(info: ModelInfo, seed: int, scale: float = 1.0, sampler: str = "") -> Options:
    path = tuple(inpainting_path(info.schedule, 3, 2))
    return Options(seed % 10, seed, num_steps_of(path), sampler or SAMPLERS[seed % 3], scale, path=path)


def inpaint_rows(info: ModelInfo, seed: int, count: int = 1, scale: float = 1.0) -> list[Trajectory]:
    """Fills in the missing pixels of a random image, along a path that goes up."""
    options = inpaint_options(info, seed, scale)
    start = Input(picture(info, seed), 0.0, 1.0, mask(info, seed))
    return Job(JobRequest(options, count, guided_steps=info.guided_steps_of(options), input=start)).unfinished


def search_rows(info: ModelInfo, seed: int) -> list[Trajectory]:
    """Returns the row that searches for the digit of an image with missing pixels."""
    path = tuple(recognition_path(info.schedule))
    options = replace(inpaint_options(info, seed), label=None)
    searched = replace(options, path=path, num_steps=num_steps_of(path), sampler="ddpm")
    search = Search(searched, ClassDistances(info.num_classes, searched.num_steps))
    start = Input(picture(info, seed), 0.0, 1.0, mask(info, seed))
    return Job(JobRequest(options, 1, input=start, search=search)).unfinished


def noisy_search_rows(info: ModelInfo, seed: int, t: int = 50) -> list[Trajectory]:
    """Returns the row that searches for the digit of an image with the noise of timestep t."""
    path = tuple(comparison_path(info.schedule, t))
    options = Options(None, RECOGNITION_SEED, 2 * (len(path) - 1), "noisy", 1.0, path=path)
    image = picture(info, seed)
    start = Input(image, *noise_above(info.schedule, *path[:2]), np.ones_like(image, dtype=np.bool_))
    noise_std = noise_levels(info.schedule)[t].item()
    search = Search(options, NoisyComparison(info.num_classes, noise_std), start)
    return Job(JobRequest(edit_rows(info, seed)[0].options, 1, input=start, search=search)).unfinished


def recognition_rows(info: ModelInfo, seed: int, num_pairs: int = NUM_PAIRS) -> list[Trajectory]:
    """Returns the row that recognises a random image."""
    path = (*recognition_timesteps(num_pairs, info.schedule.num_steps), 0)
    options = Options(None, RECOGNITION_SEED, num_pairs, "forward", 1.0, path=path)
    image = picture(info, seed)
    start = noisy_input(info, image, path[0], np.ones_like(image, dtype=np.bool_))
    (ink,) = ink_of(torch.from_numpy(image)[None])
    return Job(JobRequest(options, 1, input=start, comparison=Recognition(info.readout, ink, num_pairs))).unfinished


def task_rows(info: ModelInfo) -> list[Trajectory]:
    """Returns rows of all tasks that start from an image."""
    return [
        *edit_rows(info, 3, count=2),
        *edit_rows(info, 4, t=70, scale=2.0),
        *inpaint_rows(info, 5, count=2),
        *inpaint_rows(info, 6, scale=2.0),
        *inpaint_rows(info, 7),
        *search_rows(info, 8),
        *noisy_search_rows(info, 11),
        *recognition_rows(info, 9),
        *recognition_rows(info, 10),
    ]


def drawings(info: ModelInfo) -> list[Trajectory]:
    """Returns rows that start from noise and have no known pixels."""
    rows = mixed_rows()
    for row in rows:
        row.job.request = replace(row.job.request, guided_steps=info.guided_steps_of(row.options))
        row.job.sizes = row.job.request.sizes
    return rows


def all_rows(info: ModelInfo) -> list[Trajectory]:
    """Returns rows of all tasks that start from an image, mixed with rows that start from noise."""
    drawn = drawings(info)
    half = len(drawn) // 2
    return [*drawn[:half], *task_rows(info), *drawn[half:]]


def finish(runner: Runner, rows: Sequence[Trajectory], max_batch: int = 64, order: int | None = None) -> list[Outcome]:
    """Runs all rows to their end, as the engine does. Returns the outcome of each row.

    If `order` is given, it is the seed of a random order of the rows in each step.
    """
    shuffle, errors = random.Random(order), defaultdict[Trajectory, list[tuple[float, ...]]](list)
    while left := [row for row in rows if row.steps_left]:
        if order is not None:
            shuffle.shuffle(left)
        taken = left[:max_batch]
        assert not runner.step(StepRows.of(taken))
        for row in taken:
            row.step += 1
        compared = [row for row in taken if row.comparison]
        for row, of_row in zip(compared, runner.errors(compared).wait(), strict=True):
            errors[row].append(tuple(of_row))
            if row.comparison:
                row.comparison.add(of_row)
    pixels = runner.pixels(list(rows)).wait()
    runner.release(list(rows))
    return [(image.tobytes(), tuple(errors[row])) for row, image in zip(rows, pixels, strict=True)]
