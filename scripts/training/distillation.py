"""Distillation: trains a student network that needs fewer denoising steps than its teacher.

The teacher first generates paths from noise to image, with a deterministic sampler and with guidance. Each path keeps
the images x_t at the timesteps of the student. The student starts with the teacher's weights. It learns to get from
each kept image to the next one in a single step (Salimans & Ho 2022, section 3, but with the final number of steps from
the start). The paths already contain the guidance, so the student evaluates its network once per step (Meng 2023).
"""

import math
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from model import checkpoint
from model.checkpoint import Checkpoint
from model.files import write_atomically
from model.prediction import Prediction
from model.sampler import Denoiser, make_plan
from model.schedule import MIN_HALF_LOG_SNR, Schedule
from scripts.common.drawing import Drawer, DrawingOptions
from scripts.common.errors import ScriptError
from scripts.common.progress import Reporter
from scripts.training.loop import TrainingRequest, first_weights, train
from scripts.training.objective import HeldOut, Losses, LossOf
from scripts.training.recipe import STUDENT_SAMPLER, TEACHER_SAMPLER, DistillationRecipe, Recipe
from scripts.training.run import PATHS
from scripts.training.trainer import Trainer

PART_SIZE = 2_560  # paths per file
NO_TIME = 1e-9  # minutes; a positive time limit in which no epoch can finish
# Added to the seed of the run. Evaluations use smaller seeds, so the noise of a path is never used in an evaluation.
PATH_SEED = 2**52


def teacher_timesteps(schedule: Schedule, recipe: DistillationRecipe) -> list[int]:
    """Returns the timesteps of the teacher, in decreasing order down to 0.

    They include the student's timesteps and are nearly evenly spaced in log-SNR. There are about `teacher_steps` of
    them. Even spacing matters because a second-order step must not be much longer than the step before it.
    """
    half_log_snr = schedule.half_log_snr.clamp(min=MIN_HALF_LOG_SNR)  # (T + 1,)
    stride = (half_log_snr[1] - half_log_snr[-1]) / recipe.teacher_steps
    timesteps = {0, 1}
    for t, t_prev in pairwise(schedule.even_timesteps(recipe.num_steps)):
        low, high = half_log_snr[t], half_log_snr[max(t_prev, 1)]
        count = max(round(((high - low) / stride).item()), 1)
        grid = torch.linspace(low.item(), high.item(), count + 1, dtype=torch.float64)[:-1]  # (count,)
        nearest = (grid[:, None] - half_log_snr[1:]).abs().argmin(dim=1) + 1  # (count,)
        timesteps |= {t, *nearest.tolist()}
    return sorted(timesteps, reverse=True)


def draw_paths(
    drawer: Drawer,
    recipe: DistillationRecipe,
    folder: Path,
    reporter: Reporter,
    *,
    seed: int,
    has_time: Callable[[], bool] = lambda: True,
) -> tuple[Tensor, Tensor] | None:
    """Returns x_t along each path (N, num_steps + 1, C, H, W) in float16, and the digits (N,). Held-out paths are last.

    Loads the paths that the folder already has and generates the others. Returns None if `has_time` becomes false
    before all paths exist. Raises ScriptError if the folder has paths of another teacher, recipe, seed, device or
    dtype.
    """
    count = recipe.num_paths + recipe.num_held_out
    paths = []
    for start in range(0, count, PART_SIZE):
        file = folder / f"{start:07}.safetensors"
        if not file.exists() and not has_time():
            return None
        paths.append(_load_or_draw_part(drawer, recipe, file, range(start, start + PART_SIZE), reporter, seed=seed))
    states, y = (torch.cat([part[name] for part in paths]) for name in ("states", "y"))
    return states[:count], y[:count]


def _load_or_draw_part(
    drawer: Drawer, recipe: DistillationRecipe, file: Path, index: range, reporter: Reporter, *, seed: int
) -> dict[str, Tensor]:
    facts = {
        "teacher_weights_sha256": drawer.checkpoint.weights_sha256,
        "guidance": str(recipe.guidance),
        "timesteps": str(teacher_timesteps(drawer.checkpoint.schedule, recipe)),
        "num_steps": str(recipe.num_steps),
        "paths": f"{index.start} to {index.stop}",
        "seed": str(seed),
        "arithmetic": f"{drawer.device.type}, {drawer.dtype}{', compiled' if drawer.compiled else ''}",
    }
    if not file.exists():
        states, y = _draw_part(drawer, recipe, torch.tensor(index), reporter, seed=PATH_SEED + seed)
        write_atomically(file, serialize({"states": states, "y": y}, facts))
    try:
        with safe_open(file, framework="pt") as opened:
            if opened.metadata() != facts:
                raise ScriptError(
                    f"{file} has paths of another teacher, recipe, seed, device or dtype. Use another --out folder"
                )
            return {name: opened.get_tensor(name) for name in ("states", "y")}
    except SafetensorError as error:
        raise ScriptError(f"{file} is damaged. Remove it and run the same command again") from error


def _draw_part(
    drawer: Drawer, recipe: DistillationRecipe, index: Tensor, reporter: Reporter, *, seed: int
) -> tuple[Tensor, Tensor]:
    schedule, num_classes = drawer.checkpoint.schedule, len(drawer.class_names)
    kept = schedule.even_timesteps(recipe.num_steps)[:-1]
    states: dict[int, list[Tensor]] = {t: [] for t in kept}

    def keep(t: int, x_t: Tensor, x_0: Tensor) -> None:
        if t in states:
            states[t].append(x_t.half().cpu())

    y = index % num_classes  # (N,)
    timesteps = teacher_timesteps(schedule, recipe)
    options = DrawingOptions(TEACHER_SAMPLER, len(timesteps) - 1, recipe.guidance)
    x_0 = drawer.draw(y, index, options, reporter, seed=seed, timesteps=timesteps, on_step=keep)  # (N, C, H, W)
    return torch.stack([*(torch.cat(states[t]) for t in kept), x_0.half()], dim=1), y


class DistillationObjective:
    """Mean squared error of the student's output at a random step of each path.

    The target is the output with which the student's sampler moves exactly to the next x_t of the path.
    """

    def __init__(self, recipe: Recipe, states: Tensor, y: Tensor, device: torch.device) -> None:
        assert recipe.distillation
        self.schedule = Schedule(recipe.schedule)
        self.prediction = Prediction(recipe.prediction, self.schedule)
        plan = make_plan(self.schedule, STUDENT_SAMPLER, recipe.distillation.num_steps)
        self._t = torch.tensor(plan.timesteps[:-1], device=device)  # (K,)
        self._coefficients = plan.coefficients.to(device)  # (K, 4)
        self._mix = self.prediction.table(device)  # (T + 1, 3)
        learned = recipe.distillation.num_paths
        self._states, self._y = states[:learned].to(device), y[:learned].to(device)
        self._held_out = self._hold_out(states[learned:].to(device), y[learned:].to(device))

    @property
    def num_examples(self) -> int:
        """Number of paths in the training set, without the held-out paths."""
        return len(self._states)

    def loss_of(self, generator: torch.Generator) -> LossOf:
        """Returns the loss at one random step of each path."""

        def loss(denoiser: Denoiser, rows: Tensor) -> Tensor:
            k = torch.randint(len(self._t), rows.shape, generator=generator, device=rows.device)  # (B,)
            x_t, target = self._step_target(self._states[rows, k], self._states[rows, k + 1], k)
            output = denoiser(x_t, self._t[k], self._y[rows]).float()  # (B, C, H, W)
            return (output - target).square().mean()

        return loss

    def validation_losses(self, denoiser: Denoiser) -> Losses:
        """Returns the mean loss over all steps of the held-out paths, and the loss of each step, last step first."""
        return self._held_out.losses(denoiser)

    def _step_target(self, x_t: Tensor, x_prev: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x_t in float32 and the network output for which step k moves from x_t to x_prev.

        Shapes: images (B, C, H, W), k (B,).
        """
        x_t, x_prev = x_t.float(), x_prev.float()
        a, b, _, _ = self._coefficients[k][:, :, None, None, None].unbind(dim=1)  # (B, 1, 1, 1) each
        skip, scale, signal = self._mix[self._t[k]][:, :, None, None, None].unbind(dim=1)  # (B, 1, 1, 1) each
        x_0 = ((x_prev - a * x_t) / b).clamp(-1, 1)  # the sampler clips x_0 in the same way
        return x_t, (skip * x_t - signal * x_0) / scale

    def _hold_out(self, states: Tensor, y: Tensor) -> HeldOut:
        steps = [
            (*self._step_target(before, after, torch.full_like(y, k)), torch.full_like(y, k))
            for k, (before, after) in enumerate(pairwise(states.unbind(dim=1)))
        ]
        x_t, target, k = (torch.cat(part) for part in zip(*steps, strict=True))

        def errors(output: Tensor) -> Tensor:
            return (output - target).square().mean(dim=(1, 2, 3))

        return HeldOut(x_t, self._t[k], y.repeat(len(self._t)), errors, len(self._t) - 1 - k)


def distil(request: TrainingRequest, teacher: Path, reporter: Reporter) -> None:
    """Generates the missing paths with the teacher, which is a checkpoint file, and trains the student on all paths.

    Stops at the time limit. Raises CheckpointError if the teacher cannot be loaded. Raises ScriptError if the recipe
    does not match the teacher or the folder.
    """
    recipe, loaded = request.load_recipe(), checkpoint.load(teacher)
    distillation = _check(recipe, loaded)
    start = first_weights(loaded, recipe, "the teacher")
    device, compiled = request.prepare()
    request.out.mkdir(parents=True, exist_ok=True)
    end = time.perf_counter() + (60 * request.time_limit if request.time_limit else math.inf)
    drawer = Drawer(loaded, device)
    drawer.compile("on" if compiled else "off", reporter)
    paths = draw_paths(
        drawer,
        distillation,
        request.out / PATHS,
        reporter,
        seed=request.seed,
        has_time=lambda: time.perf_counter() < end,
    )
    if not paths:
        reporter.line("time limit reached before all paths were generated; run the same command again to resume")
        return
    objective = DistillationObjective(recipe, *paths, device)
    trainer = Trainer(recipe, objective, seed=request.seed, device=device, compiled=compiled, start=start)
    guidance = distillation.guidance
    data = (
        f"{objective.num_examples} paths of the weights {loaded.weights_sha256}, "
        f"guided by {guidance.scale:g} at t = {guidance.start} to {guidance.stop}"
    )
    minutes_left = (end - time.perf_counter()) / 60
    time_limit = max(minutes_left, NO_TIME) if request.time_limit else None
    train(trainer, request.run_of(recipe, data, loaded.config.class_names), reporter, time_limit=time_limit)


def _check(recipe: Recipe, teacher: Checkpoint) -> DistillationRecipe:
    """Returns the recipe's table [distillation]. Raises ScriptError if it is missing or does not fit the teacher."""
    if not recipe.distillation:
        raise ScriptError("the recipe has no [distillation] table. Use --preset fast, or train with scripts.train")
    its = teacher.config
    if its.steps or TEACHER_SAMPLER not in its.samplers:
        raise ScriptError(
            f"the teacher must permit the sampler {TEACHER_SAMPLER} with any number of steps. "
            f"It permits {', '.join(its.samplers)} with {' or '.join(map(str, its.steps)) or 'any number of'} steps"
        )
    if recipe.distillation.guidance.scale != 1 and not its.guidable:
        raise ScriptError(
            "the teacher was trained without label dropout and does not support guidance. "
            "Set distillation.guidance.scale to 1, or use another teacher"
        )
    return recipe.distillation
