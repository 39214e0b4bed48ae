"""Few steps: a student learns to reach in one stride what its teacher reaches in several.

The teacher's guided, deterministic paths from noise to image are drawn once. Of each path the
states at the student's timesteps are kept; the student, which begins as the teacher, learns to step
from each to the next (Salimans & Ho 2022, section 3, all strides at once; Meng 2023 for the guidance,
which is in the paths, so that the student needs no second evaluation).
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
from scripts.training.loop import TrainingRequest, train
from scripts.training.objective import HeldOut, Losses, LossOf
from scripts.training.recipe import STUDENT_SAMPLER, TEACHER_SAMPLER, DistillationRecipe, Recipe
from scripts.training.trainer import Trainer

PART_SIZE = 2_560  # paths a file
NO_TIME = 1e-9  # minutes; no epoch fits into this time
PATH_SEED = 2**52  # plus the run's: digits that are evaluated with a smaller seed share no noise with a path


def teacher_timesteps(schedule: Schedule, recipe: DistillationRecipe) -> list[int]:
    """About `teacher_steps`, the student's among them, falling to 0, as even in log-SNR as that allows.

    Even also across the student's timesteps: a second-order step must not be much longer than the one before it.
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
    """Returns states (N, num_steps + 1, C, H, W) float16 and digits (N,), held-out ones last; None if time ran out.

    Keeps the paths that are in the folder. Raises ScriptError if they are of another teacher, seed or arithmetic.
    """
    count = recipe.num_paths + recipe.num_held_out
    paths = []
    for start in range(0, count, PART_SIZE):
        file = folder / f"{start:07}.safetensors"
        if not file.exists() and not has_time():
            return None
        paths.append(_part(drawer, recipe, file, range(start, start + PART_SIZE), reporter, seed=seed))
    states, y = (torch.cat([part[name] for part in paths]) for name in ("states", "y"))
    return states[:count], y[:count]


def _part(
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
                    f"{file} holds paths of another teacher, recipe, seed or arithmetic; name another --out"
                )
            return {name: opened.get_tensor(name) for name in ("states", "y")}
    except SafetensorError as error:
        raise ScriptError(f"{file} is damaged: remove it and start again") from error


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
    """The student's error at a random state of each path, from which it should step to the next."""

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
        """Paths that are learned from."""
        return len(self._states)

    def loss_of(self, generator: torch.Generator) -> LossOf:
        """One random stride of each path."""

        def loss(denoiser: Denoiser, rows: Tensor) -> Tensor:
            k = torch.randint(len(self._t), rows.shape, generator=generator, device=rows.device)  # (B,)
            x_t, target = self._stride(self._states[rows, k], self._states[rows, k + 1], k)
            output = denoiser(x_t, self._t[k], self._y[rows]).float()  # (B, C, H, W)
            return (output - target).square().mean()

        return loss

    def validation_losses(self, denoiser: Denoiser) -> Losses:
        """Over every stride of the paths that are held out; a band is a stride, the last one first."""
        return self._held_out.losses(denoiser)

    def _stride(self, x_t: Tensor, x_prev: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """x_t in float32, and the output with which step k leads from x_t to x_prev; images (B, C, H, W), k (B,)."""
        x_t, x_prev = x_t.float(), x_prev.float()
        a, b, _, _ = self._coefficients[k][:, :, None, None, None].unbind(dim=1)  # (B, 1, 1, 1) each
        skip, scale, signal = self._mix[self._t[k]][:, :, None, None, None].unbind(dim=1)  # (B, 1, 1, 1) each
        x_0 = ((x_prev - a * x_t) / b).clamp(-1, 1)  # as the sampler will clip it
        return x_t, (skip * x_t - signal * x_0) / scale

    def _hold_out(self, states: Tensor, y: Tensor) -> HeldOut:
        strides = [
            (*self._stride(before, after, torch.full_like(y, k)), torch.full_like(y, k))
            for k, (before, after) in enumerate(pairwise(states.unbind(dim=1)))
        ]
        x_t, target, k = (torch.cat(part) for part in zip(*strides, strict=True))
        weights, band = torch.ones_like(x_t[:, 0, 0, 0]), len(self._t) - 1 - k  # (N,) each
        return HeldOut(x_t, self._t[k], y.repeat(len(self._t)), target, weights, band)


def distil(request: TrainingRequest, teacher: Path, reporter: Reporter) -> None:
    """Draws the missing paths of the teacher, a checkpoint, and trains the student on all of them.

    Stops within the time limit. Raises CheckpointError, and ScriptError if recipe, teacher and folder do not fit.
    """
    recipe, loaded = request.load_recipe(), checkpoint.load(teacher)
    distillation = _check(recipe, loaded)
    device, compiled = request.prepare()
    request.out.mkdir(parents=True, exist_ok=True)
    end = time.perf_counter() + (60 * request.time_limit if request.time_limit else math.inf)
    start = {name: tensor.clone() for name, tensor in loaded.network.state_dict().items()}
    drawer = Drawer(loaded, device)
    drawer.compile("on" if compiled else "off", reporter)
    paths = draw_paths(
        drawer,
        distillation,
        request.out / "paths",
        reporter,
        seed=request.seed,
        has_time=lambda: time.perf_counter() < end,
    )
    if not paths:
        reporter.line("the time limit is there, not all paths: start again to go on")
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
    train(trainer, request.run_of(recipe, data), reporter, time_limit=time_limit)


def _check(recipe: Recipe, teacher: Checkpoint) -> DistillationRecipe:
    """Raises ScriptError if the recipe has no distillation or does not fit the teacher."""
    if not recipe.distillation:
        raise ScriptError("the recipe has no [distillation]")
    own, its = (recipe.unet, recipe.schedule, recipe.prediction), teacher.config
    for mine, theirs in zip(own, (its.unet, its.schedule, its.prediction), strict=True):
        if mine != theirs:
            raise ScriptError(f"the student begins as its teacher, which is of another kind: {theirs}")
    if its.steps or TEACHER_SAMPLER not in its.samplers:
        raise ScriptError(
            f"the teacher draws in {TEACHER_SAMPLER}'s steps, any number of them, which this one does not permit"
        )
    if recipe.distillation.guidance.scale != 1 and not its.guidable:
        raise ScriptError("this teacher cannot be guided: no label was dropped in its training")
    return recipe.distillation
