"""What a training run minimises over its examples: for a denoiser, its errors at random timesteps of real images."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from model.diffusion import Diffusion
from model.pixels import from_pixels
from model.prediction import Prediction
from model.sampler import Denoiser
from model.schedule import Schedule
from scripts.common.mnist import split_validation
from scripts.training.recipe import Recipe

NUM_BANDS = 4  # the validation loss of a denoiser is also given for each quarter of the steps
VALIDATION_BATCH = 500
LossOf = Callable[[Denoiser, Tensor], Tensor]  # (denoiser, rows of the examples (B,)) -> scalar
Losses = tuple[float, tuple[float, ...]]  # over all held-out rows, and over those of each band, little noise first


class Objective(Protocol):
    """Examples, and the loss over any of them."""

    schedule: Schedule
    prediction: Prediction

    @property
    def num_examples(self) -> int:
        """How many are learned from in an epoch."""

    def loss_of(self, generator: torch.Generator) -> LossOf:
        """The loss for an epoch whose randomness comes from the generator."""

    def validation_losses(self, denoiser: Denoiser) -> Losses:
        """The same loss over examples that are held out, always the same rows."""


class DenoisingObjective:
    """The recipe's loss (Ho 2020, eq. 14) over images uint8 (N, C, H, W) and labels (N,), less those held out."""

    def __init__(self, recipe: Recipe, images: Tensor, labels: Tensor, device: torch.device) -> None:
        self.recipe = recipe
        self.schedule = Schedule(recipe.schedule)
        self.prediction = Prediction(recipe.prediction, self.schedule)
        learn, validate = split_validation(images, labels)
        self._images, self._labels = learn[0].to(device), learn[1].to(device)
        self._held_out = _held_out(*validate, self._diffusion(torch.Generator().manual_seed(0)), device)

    @property
    def num_examples(self) -> int:
        """Images that are learned from."""
        return len(self._images)

    def loss_of(self, generator: torch.Generator) -> LossOf:
        """A random t and eps for each image, its label dropped as often as the recipe says."""
        diffusion, null_label = self._diffusion(generator), self.recipe.unet.num_classes

        def loss(denoiser: Denoiser, rows: Tensor) -> Tensor:
            x_0, y = from_pixels(self._images[rows]), self._labels[rows]
            c_mask = diffusion.draw_label_mask(len(rows), self.recipe.label_drop)
            return diffusion.train_step(denoiser, x_0, y, c_mask, null_label)

        return loss

    def validation_losses(self, denoiser: Denoiser) -> Losses:
        """Over held-out images, each with one t and one eps that never change: two epochs can be compared."""
        return self._held_out.losses(denoiser)

    def _diffusion(self, generator: torch.Generator) -> Diffusion:
        return Diffusion(self.schedule, generator, self.prediction, self.recipe.min_snr_gamma)


class HeldOut:
    """Rows of x_t, t and y with what should be predicted, each row's weight, and the band in which it counts."""

    def __init__(self, x_t: Tensor, t: Tensor, y: Tensor, target: Tensor, weights: Tensor, band: Tensor) -> None:
        self.x_t, self.t, self.y, self.target, self.weights, self.band = x_t, t, y, target, weights, band

    @torch.inference_mode()
    def losses(self, denoiser: Denoiser) -> Losses:
        """The mean squared error over all rows, and over the rows of each band."""
        batches = zip(*(rows.split(VALIDATION_BATCH) for rows in (self.x_t, self.t, self.y)), strict=True)
        output = torch.cat([denoiser(*batch) for batch in batches])  # (N, C, H, W)
        errors = self.weights * (output - self.target).square().mean(dim=(1, 2, 3))  # (N,)
        bands = tuple(errors[self.band == band].mean().item() for band in self.band.unique())
        return errors.mean().item(), bands


def _held_out(images: Tensor, labels: Tensor, diffusion: Diffusion, device: torch.device) -> HeldOut:
    x_0, t = from_pixels(images), torch.arange(len(images)) % diffusion.num_steps + 1  # (N,)
    x_t, eps = diffusion.add_noise(x_0, t)
    target, weights = diffusion.prediction.target(x_0, eps, t), diffusion.weights[t]
    band = (t - 1) * NUM_BANDS // diffusion.num_steps  # (N,)
    return HeldOut(*(rows.to(device) for rows in (x_t, t, labels, target, weights, band)))
