"""Trains a network by a recipe, one epoch at a time, and can stop and go on between any two.

All randomness of an epoch comes from a generator seeded with (seed, epoch), so nothing of
it has to be saved: a run that was killed repeats its last epoch bit by bit.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel

from model.compiled.compiler import default_cache
from model.compiled.private_cache import use_private_compile_cache
from model.diffusion import running_average
from model.unet import UNet
from scripts.training.objective import LossOf, Objective
from scripts.training.recipe import Recipe

OnStep = Callable[[int, float], None]


@dataclass(frozen=True, slots=True)
class EpochResult:
    """What one epoch gave; the losses are mean squared errors of what is predicted, weighted as in training."""

    epoch: int
    train_loss: float
    validation_loss: float
    band_losses: tuple[float, ...]  # t in 1..T/4, ... ; little noise first
    learning_rate: float


class Trainer:
    """The state of a run: network, running average, optimizer, learning rate, epoch.

    `start` has the first weights of the network. `averaged` is the network whose weights are served.
    """

    def __init__(
        self,
        recipe: Recipe,
        objective: Objective,
        *,
        seed: int,
        device: torch.device,
        compiled: bool,
        start: dict[str, Tensor] | None = None,
    ) -> None:
        torch.manual_seed(seed)
        self.recipe, self.objective, self.seed, self.device = recipe, objective, seed, device
        self.network = _new_network(recipe, device)
        if start:
            self.network.load_state_dict(start)
        # Without an EMA the largest decay is 0, and the average equals the network.
        self._average = AveragedModel(self.network, multi_avg_fn=running_average(recipe.ema_max_decay))
        self._average.n_averaged.fill_(1)  # the first weights are part of the average
        self.averaged = cast(UNet, self._average.module).eval().requires_grad_(False)
        optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer.name]
        constants = recipe.optimizer
        self.optimizer = optimizer(
            self.network.parameters(),
            lr=constants.lr,
            betas=constants.betas,
            weight_decay=constants.weight_decay,
            fused=True,
        )
        self.plateau = ReduceLROnPlateau(
            self.optimizer, patience=recipe.lr_schedule.patience, factor=recipe.lr_schedule.factor
        )
        self.epoch = 0
        self.compiled = compiled
        if compiled:
            use_private_compile_cache(default_cache())
        self.denoiser = torch.compile(self._denoise) if compiled else self._denoise
        self.arithmetic = f"torch {torch.__version__}, {device.type}, {torch.get_num_threads()} threads" + (
            ", compiled" if compiled else ""
        )  # what decides the last bits beside the recipe and the seed

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches only: the rest of an epoch's shuffle is left out."""
        return self.objective.num_examples // self.recipe.batch_size

    def run_epoch(self, on_step: OnStep = lambda step, loss: None) -> EpochResult:
        """One pass over the training images, then the validation loss of the weights to serve."""
        generator = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + self.epoch)
        loss_of = self.objective.loss_of(generator)
        order = torch.randperm(self.objective.num_examples, generator=generator, device=self.device)
        total = torch.zeros((), device=self.device)
        for step in range(self.steps_per_epoch):
            rows = order[step * self.recipe.batch_size : (step + 1) * self.recipe.batch_size]
            loss = self._learn_from(rows, loss_of, self.epoch * self.steps_per_epoch + step)
            total += loss
            on_step(step, loss.item())
        self.epoch += 1
        validation_loss, band_losses = self.objective.validation_losses(self.denoise_averaged)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        if self.recipe.lr_schedule.name == "plateau":
            self.plateau.step(validation_loss)
        train_loss = total.item() / self.steps_per_epoch
        return EpochResult(self.epoch, train_loss, validation_loss, band_losses, learning_rate)

    def state_dict(self) -> dict[str, Any]:
        """All that a later run needs to go on as if it had never stopped."""
        return {
            "network": self.network.state_dict(),
            "ema": {"step": int(self._average.n_averaged) - 1, "shadow": self.averaged.state_dict()},
            "optimizer": self.optimizer.state_dict(),
            "plateau": self.plateau.state_dict(),
            "epoch": self.epoch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.plateau.load_state_dict(state["plateau"])
        self.epoch = state["epoch"]
        # Earlier releases stored None for a recipe without an EMA.
        ema = state["ema"] or {"step": 0, "shadow": state["network"]}
        self._average.n_averaged.fill_(ema["step"] + 1)
        self.averaged.load_state_dict(ema["shadow"])

    def _learn_from(self, rows: Tensor, loss_of: LossOf, global_step: int) -> Tensor:
        self._set_learning_rate(global_step)
        loss = loss_of(self.denoiser, rows)
        self.optimizer.zero_grad()
        loss.backward()
        if self.recipe.grad_clip:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.grad_clip)
        self.optimizer.step()
        self._average.update_parameters(self.network)
        return loss.detach()

    def _denoise(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self._in_precision(self.network, x_t, t, y)

    def denoise_averaged(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """What the weights to serve predict, in the recipe's precision."""
        return self._in_precision(self.averaged, x_t, t, y).float()

    def _in_precision(self, network: UNet, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
            return network(x_t.contiguous(memory_format=torch.channels_last), t, y)

    def _set_learning_rate(self, global_step: int) -> None:
        plan = self.recipe.lr_schedule
        if plan.name != "cosine":
            return
        progress = global_step / (self.recipe.epochs * self.steps_per_epoch)
        factor = min((global_step + 1) / max(plan.warmup_steps, 1), 1) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.optimizer.lr * factor


def _new_network(recipe: Recipe, device: torch.device) -> UNet:
    network = UNet(recipe.unet).to(device)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # not in the stubs
