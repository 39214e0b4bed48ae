"""Trains a network with a recipe, one epoch at a time. Training can be stopped and resumed between epochs.

All random numbers of an epoch come from a generator that is seeded with (seed, epoch). The state of the generator is
therefore not saved: a resumed run repeats the interrupted epoch with the same bits.
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
    """Result of one epoch. The losses are mean squared errors of the network's output, with the training weights."""

    epoch: int
    train_loss: float
    validation_loss: float
    band_losses: tuple[float, ...]  # of four bands of t; the first, 1..T/4, has the least noise
    learning_rate: float


class Trainer:
    """Holds the network, its moving average, the optimizer, the learning rate and the epoch.

    `start` contains the initial weights of the network. `averaged` is the network that is saved in the checkpoint.
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
        # Without an EMA, the maximum decay is 0 and the average equals the network.
        self._average = AveragedModel(self.network, multi_avg_fn=running_average(recipe.ema_max_decay))
        self._average.n_averaged.fill_(1)  # count the initial weights as part of the average
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
        # Two runs have the same bits only if this description, the recipe and the seed are the same.
        self.arithmetic = f"torch {torch.__version__}, {device.type}, {torch.get_num_threads()} threads" + (
            ", compiled" if compiled else ""
        )

    @property
    def steps_per_epoch(self) -> int:
        """Number of full batches. The remaining examples of the epoch's shuffle are not used."""
        return self.objective.num_examples // self.recipe.batch_size

    def run_epoch(self, on_step: OnStep = lambda step, loss: None) -> EpochResult:
        """Trains on all training examples once, then computes the validation loss of the averaged weights.

        `on_step` is called with the index of the step and its loss.
        """
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
        """Returns the state from which a resumed run continues with the same bits as an uninterrupted run."""
        return {
            "network": self.network.state_dict(),
            "ema": {"step": int(self._average.n_averaged) - 1, "shadow": self.averaged.state_dict()},
            "optimizer": self.optimizer.state_dict(),
            "plateau": self.plateau.state_dict(),
            "epoch": self.epoch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state that `state_dict` returned, also that of the previous release."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.plateau.load_state_dict(state["plateau"])
        self.epoch = state["epoch"]
        # The previous release stored None for a recipe without an EMA.
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
        """Returns the output of the averaged network in float32, computed in the precision of the recipe."""
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
