"""Trains a network with a recipe, one epoch at a time. Training can be stopped and resumed after each step.

All random numbers of an epoch come from a generator that is seeded with (seed, epoch). The state within an epoch is the
number of its steps, the sum of their losses and the state of the generator. A resumed run continues with the same
random numbers, and on a CPU with the same bits. Several processes train with the same random numbers as one (see
processes.py), and every process has the same weights and the same state.

On a GPU the training step runs as a CUDA graph (graphs.py). The host waits for the GPU only to report progress.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from model.compiled.private_cache import default_cache, use_private_compile_cache
from model.diffusion import ema_decay
from model.precision import fast_dtype
from model.unet import UNet
from scripts.training.graphs import CudaGraph, GraphedStep, MakeGraph
from scripts.training.objective import Objective
from scripts.training.processes import ALONE, Processes
from scripts.training.recipe import Recipe

OnSteps = Callable[[int, float], None]
GPU_REPORT_STEPS = 50  # steps per progress report on a GPU; each report reads a loss and so waits for the GPU


@dataclass(frozen=True, slots=True)
class EpochResult:
    """Result of one epoch. The losses are those of the objective."""

    epoch: int
    train_loss: float
    validation_loss: float
    band_losses: tuple[float, ...]  # of the bands of t, from low noise to high; see the objective
    learning_rate: float


class Trainer:
    """Holds the network, its moving average, the optimizer, the learning rate and the epoch.

    `start` contains the initial weights of the network. `averaged` is the network that is saved in the checkpoint. With
    `make_graph` the step runs as a graph; the default is a CUDA graph if one process trains on a GPU, otherwise none.
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
        make_graph: MakeGraph | None = None,
        processes: Processes = ALONE,
    ) -> None:
        torch.manual_seed(seed)
        self.recipe, self.objective, self.seed, self.device = recipe, objective, seed, device
        self.processes = processes
        self.network = _new_network(recipe, device)
        if start:
            self.network.load_state_dict(start)
        processes.copy_from_first(list(self.network.parameters()))
        self.averaged = copy.deepcopy(self.network).eval().requires_grad_(False)
        self._autocast = uses_bfloat16(recipe, device)
        # A graph of several processes would have to record NCCL's operations, which was never tried.
        has_graph = device.type == "cuda" and processes.count == 1
        self._make_graph = make_graph or (CudaGraph if has_graph else None)
        self.steps_per_report = GPU_REPORT_STEPS if device.type == "cuda" else 1
        self._generator = torch.Generator(device)
        self._loss_of = objective.loss_of(self._generator)
        # The step reads these tensors. `_learn_from` sets them before each step.
        self._rows = torch.zeros(recipe.batch_size, dtype=torch.int64, device=device)  # (B,)
        self._new_weight = torch.zeros((), device=device)  # of the network in its moving average
        constants = recipe.optimizer
        self._learning_rate = torch.tensor(constants.lr, device=device)
        optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer.name]
        self.optimizer = optimizer(
            self.network.parameters(),
            lr=constants.lr,
            betas=constants.betas,
            weight_decay=constants.weight_decay,
            fused=True,
        )
        self._prepare_step()
        self.plateau = ReduceLROnPlateau(
            self.optimizer, patience=recipe.lr_schedule.patience, factor=recipe.lr_schedule.factor
        )
        self.epoch = 0
        self._num_done = 0  # steps of the current epoch
        self._total = torch.zeros((), device=device)  # the sum of their losses
        self.compiled = compiled
        if compiled:
            processes.remove_unfinished(use_private_compile_cache(default_cache()))
        self.denoiser = processes.shared(torch.compile(self._denoise, dynamic=False) if compiled else self._denoise)
        # Two runs have the same bits only if this description, the recipe and the seed are the same.
        self.arithmetic = (
            f"torch {torch.__version__}, {device.type}, {torch.get_num_threads()} threads"
            + (", compiled" if compiled else "")
            + (f", {processes.count} processes" if processes.count > 1 else "")
        )

    @property
    def steps_per_epoch(self) -> int:
        """Number of full batches. The remaining examples of the epoch's shuffle are not used."""
        return self.objective.num_examples // self.recipe.batch_size

    @property
    def images_done(self) -> int:
        """Number of images of the current epoch from which the network has learned."""
        return self._num_done * self.recipe.batch_size

    def run_epoch(self, on_steps: OnSteps = lambda count, loss: None) -> EpochResult:
        """Trains on all training examples once, then computes the validation loss of the averaged weights.

        `on_steps` is called after every `steps_per_report` steps and after the last step of the epoch. It gets the
        number of steps since the last call and the loss of the last step. The state can be saved during such a call.
        """
        within = self._generator.get_state() if self._num_done else None  # of an epoch that was resumed
        self._generator.manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.objective.num_examples, generator=self._generator, device=self.device)
        if within is not None:
            self._generator.set_state(within)
        num_reported = self._num_done
        for step in range(self._num_done, self.steps_per_epoch):
            rows = order[step * self.recipe.batch_size : (step + 1) * self.recipe.batch_size]
            loss = self._learn_from(rows, self.epoch * self.steps_per_epoch + step)
            self._total += loss
            self._num_done += 1
            if self._num_done == self.steps_per_epoch or self._num_done % self.steps_per_report == 0:
                on_steps(self._num_done - num_reported, loss.item())
                num_reported = self._num_done
        train_loss = self._total.item() / self.steps_per_epoch
        self.epoch, self._num_done = self.epoch + 1, 0
        self._total.zero_()
        losses = self.objective.validation_losses(self.processes.shared(self.denoise_averaged))
        validation_loss, band_losses = self.processes.from_first(losses)  # equal, so that the plateau is too
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        if self.recipe.lr_schedule.name == "plateau":
            self.plateau.step(validation_loss)
        return EpochResult(self.epoch, train_loss, validation_loss, band_losses, learning_rate)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state from which a resumed run continues: on a CPU with the bits of an uninterrupted run."""
        return {
            "network": self.network.state_dict(),
            "ema": {
                "step": self.epoch * self.steps_per_epoch + self._num_done,
                "shadow": self.averaged.state_dict(),
            },
            "optimizer": self.optimizer.state_dict(),
            "plateau": self.plateau.state_dict(),
            "objective": self.objective.state_dict(),
            "epoch": self.epoch,
            "within_epoch": {
                "num_done": self._num_done,
                "total": self._total,
                "generator": self._generator.get_state(),
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state that `state_dict` returned, also that of the previous release, which is between epochs."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.plateau.load_state_dict(state["plateau"])
        self.objective.load_state_dict(state.get("objective", {}))
        self.epoch = state["epoch"]
        if within := state.get("within_epoch"):
            self._num_done = within["num_done"]
            self._total.copy_(within["total"])
            self._generator.set_state(within["generator"].cpu())
        # The previous release stored None for a recipe without an EMA. Its average equals the network.
        self.averaged.load_state_dict(state["ema"]["shadow"] if state["ema"] else state["network"])
        self._prepare_step()

    def _prepare_step(self) -> None:
        """Sets the step that `_learn_from` runs. The optimizer's state may be that of a run with or without a graph.

        A new graph is needed when the optimizer has new state tensors.
        """
        self._run_step = GraphedStep(self._step, self._make_graph(self._generator)) if self._make_graph else self._step
        for group in self.optimizer.param_groups:
            group["capturable"] = self._make_graph is not None
        self._apply_rate(float(self.optimizer.param_groups[0]["lr"]))

    def _learn_from(self, rows: Tensor, global_step: int) -> Tensor:
        """Sets the inputs of the step and runs it. Returns the loss, which is valid until the next call."""
        self._rows.copy_(rows)
        self._new_weight.fill_(1 - ema_decay(global_step + 1, self.recipe.ema_max_decay))
        self._set_learning_rate(global_step)
        return self._run_step()

    def _step(self) -> Tensor:
        """Runs one training step on the examples `_rows`, and returns the loss.

        A graph can repeat it: all values that change are in tensors, and no operation waits for the device.
        """
        loss = self._loss_of(self.denoiser, self._rows)
        self.optimizer.zero_grad()
        loss.backward()
        self.processes.add_up([p.grad for p in self.network.parameters() if p.grad is not None])
        if self.recipe.grad_clip:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.grad_clip)
        self.optimizer.step()
        self._update_average()
        return loss.detach()

    @torch.no_grad()
    def _update_average(self) -> None:
        """Adds the network to its moving average. Without an EMA its weight is 1, so the average equals the network."""
        averaged: list[Tensor] = list(self.averaged.parameters())
        current: list[Tensor] = list(self.network.parameters())
        weights = [self._new_weight] * len(averaged)
        torch._foreach_lerp_(averaged, current, weights)

    def _denoise(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self._in_precision(self.network, x_t, t, y)

    def denoise_averaged(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Returns the output of the averaged network in float32, computed in the precision of the recipe."""
        return self._in_precision(self.averaged, x_t, t, y).float()

    def _in_precision(self, network: UNet, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            return network(x_t.contiguous(memory_format=torch.channels_last), t, y)

    def _set_learning_rate(self, global_step: int) -> None:
        if self.recipe.lr_schedule.name == "cosine":
            self._apply_rate(self._cosine_rate(global_step))

    def _apply_rate(self, lr: float) -> None:
        """Sets the learning rate of the optimizer. A graph reads it from a tensor."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate.fill_(lr) if self._make_graph else lr

    def _cosine_rate(self, global_step: int) -> float:
        progress = global_step / (self.recipe.epochs * self.steps_per_epoch)
        warm_up = min((global_step + 1) / max(self.recipe.lr_schedule.warmup_steps, 1), 1)
        return self.recipe.optimizer.lr * (warm_up * 0.5 * (1 + math.cos(math.pi * progress)))


def uses_bfloat16(recipe: Recipe, device: torch.device) -> bool:
    """Returns True if the network computes in bfloat16. Its weights and the optimizer are in float32 in any case.

    A device without instructions for bfloat16 uses float32: a CPU would be many times slower with bfloat16, and float16
    on a GPU would need scaled gradients.
    """
    return recipe.precision == "bfloat16" and fast_dtype(device) == torch.bfloat16


def _new_network(recipe: Recipe, device: torch.device) -> UNet:
    network = UNet(recipe.unet).to(device)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # not in the stubs
