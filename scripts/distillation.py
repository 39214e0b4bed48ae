"""Few steps: a student learns to reach in one stride what its teacher reaches in several.

The teacher's guided, deterministic paths from noise to image are drawn once. Of each path the
states at the student's timesteps are kept; the student, which begins as the teacher, learns to step
from each to the next (Salimans & Ho 2022, section 3, all strides at once; Meng 2023 for the guidance,
which is in the paths, so that the student needs no second evaluation).
"""

from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor

from model.checkpoint import write_atomically
from model.prediction import Prediction
from model.sampler import Denoiser, make_plan
from model.schedule import Schedule
from scripts.drawing import Drawer, DrawingOptions
from scripts.objective import HeldOut, Losses, LossOf
from scripts.progress import Reporter
from scripts.recipe import STUDENT_SAMPLER, DistillationRecipe, Recipe

PART_SIZE = 2_500  # paths a file
HELD_OUT_SHARE = 20  # one path in so many validates


def teacher_timesteps(schedule: Schedule, recipe: DistillationRecipe) -> list[int]:
    """Those of a good solver with so many steps, and the student's among them, falling to 0."""
    own = schedule.log_snr_timesteps(recipe.teacher_steps)
    return sorted({*own, *schedule.even_timesteps(recipe.num_steps)}, reverse=True)


def draw_paths(
    drawer: Drawer, recipe: DistillationRecipe, folder: Path, reporter: Reporter, *, seed: int
) -> tuple[Tensor, Tensor]:
    """The states (N, num_steps + 1, C, H, W) float16 and digits (N,); what lies in the folder is kept."""
    made = f"{drawer.checkpoint.sha256[:16]}-seed{seed}-{recipe.teacher_steps}to{recipe.num_steps}"
    parts = torch.arange(recipe.num_trajectories).split(PART_SIZE)
    paths = []
    for number, index in enumerate(parts):
        file = folder / made / f"{number:03}.safetensors"
        if not file.exists():
            states, y = _draw_part(drawer, recipe, index, reporter, seed=seed)
            write_atomically(file, serialize({"states": states, "y": y}))
        paths.append(load_file(file))
    return torch.cat([part["states"] for part in paths]), torch.cat([part["y"] for part in paths])


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
    options = DrawingOptions("dpmpp", len(timesteps) - 1, drawer.checkpoint.config.guidance)
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
        held_out = len(states) // HELD_OUT_SHARE
        self._states, self._y = states[:-held_out].to(device), y[:-held_out].to(device)
        self._held_out = self._hold_out(states[-held_out:].to(device), y[-held_out:].to(device))

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
        """Over every stride of the paths that are held out."""
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
        weights = torch.ones_like(x_t[:, 0, 0, 0])
        return HeldOut(x_t, self._t[k], y.repeat(len(self._t)), target, weights, self.schedule.num_steps)
