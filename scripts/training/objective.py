"""Loss functions for training: the interface, and the denoising loss at random timesteps of real images."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from model.diffusion import Diffusion
from model.pixels import from_pixels
from model.prediction import Prediction
from model.sampler import Denoiser
from model.schedule import Schedule
from scripts.common.data.data_set import ImageSet
from scripts.training.recipe import Recipe

NUM_BANDS = 4  # the validation loss is also reported for each quarter of the timesteps
VALIDATION_BATCH = 500
FEWEST_ROWS, MOST_ROWS = 1000, 10_000  # of the validation
LossOf = Callable[[Denoiser, Tensor], Tensor]  # (denoiser, rows of the examples (B,)) -> scalar
# Mean over all held-out rows, then the mean of each band of timesteps. The first band has the least noise.
Losses = tuple[float, tuple[float, ...]]


class Objective(Protocol):
    """Training examples and the loss on them."""

    schedule: Schedule
    prediction: Prediction

    @property
    def num_examples(self) -> int:
        """Number of training examples in an epoch, without the held-out examples."""

    def loss_of(self, generator: torch.Generator) -> LossOf:
        """Returns the loss function. It takes all its random numbers from the generator.

        It waits for no device and copies nothing between devices, so that a CUDA graph can record it.
        """

    def validation_losses(self, denoiser: Denoiser) -> Losses:
        """Returns the loss on the held-out examples. The rows and their noise are the same at every call."""

    def state_dict(self) -> dict[str, Any]:
        """Returns what the objective itself has learned."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""


class DenoisingObjective:
    """The loss of Ho 2020, eq. 14, with the weights and the prediction of the recipe.

    With `recipe.flip`, it mirrors half of the training images.
    """

    def __init__(self, recipe: Recipe, learn: ImageSet, validate: ImageSet, device: torch.device) -> None:
        self.recipe = recipe
        self.schedule = Schedule(recipe.schedule)
        self.prediction = Prediction(recipe.prediction, self.schedule)
        self._images, self._labels = learn.images.to(device), learn.labels.to(device)
        self._held_out = _held_out(validate, self._diffusion(torch.Generator().manual_seed(0)), device)

    @property
    def num_examples(self) -> int:
        """Number of training images, without the held-out images."""
        return len(self._images)

    def loss_of(self, generator: torch.Generator) -> LossOf:
        """Returns the loss with a random t and eps for each image. Drops labels with the probability `label_drop`."""
        diffusion, null_label = self._diffusion(generator), self.recipe.unet.num_classes

        def loss(denoiser: Denoiser, rows: Tensor) -> Tensor:
            x_0, y = from_pixels(self._images[rows]), self._labels[rows]
            if self.recipe.flip:
                x_0 = half_mirrored(x_0, generator)
            c_mask = diffusion.draw_label_mask(len(rows), self.recipe.label_drop)
            return diffusion.train_step(denoiser, x_0, y, c_mask, null_label)

        return loss

    def validation_losses(self, denoiser: Denoiser) -> Losses:
        """Returns the loss on the held-out images. Each has a fixed t and eps, so that epochs can be compared."""
        return self._held_out.losses(denoiser)

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty state, because this objective learns nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Has nothing to restore."""

    def _diffusion(self, generator: torch.Generator) -> Diffusion:
        return Diffusion(
            self.schedule,
            generator,
            self.prediction,
            self.recipe.min_snr_gamma,
            self.recipe.min_loss_weight,
            self.recipe.overshoot_weight,
        )


def half_mirrored(x_0: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrors each image of (B, C, H, W) with probability 0.5."""
    is_mirrored = torch.rand(len(x_0), 1, 1, 1, generator=generator, device=x_0.device) < 0.5
    return torch.where(is_mirrored, x_0.flip(-1), x_0)


class HeldOut:
    """Validation rows: inputs x_t, t and y, the index of the band, and `errors`, the loss of each row of an output.

    `errors` and `band` are on one device, which need not be that of the inputs and of the output.
    """

    def __init__(self, x_t: Tensor, t: Tensor, y: Tensor, errors: Callable[[Tensor], Tensor], band: Tensor) -> None:
        self.x_t, self.t, self.y, self.errors, self.band = x_t, t, y, errors, band

    @torch.inference_mode()
    def losses(self, denoiser: Denoiser) -> Losses:
        """Returns the mean loss over all rows, and over the rows of each band."""
        batches = zip(*(rows.split(VALIDATION_BATCH) for rows in (self.x_t, self.t, self.y)), strict=True)
        output = torch.cat([denoiser(*batch) for batch in batches])  # (N, C, H, W)
        errors = self.errors(output)  # (N,)
        bands = tuple(errors[self.band == band].mean().item() for band in self.band.unique())
        return errors.mean().item(), bands


def _held_out(images: ImageSet, diffusion: Diffusion, device: torch.device) -> HeldOut:
    images = images.rows(_validation_rows(len(images), diffusion.generator))
    x_0, t = from_pixels(images.images), torch.arange(len(images)) % diffusion.num_steps + 1  # (N,)
    x_t, eps = diffusion.add_noise(x_0, t)
    band = (t - 1) * NUM_BANDS // diffusion.num_steps  # (N,)
    errors = partial(_errors_on_cpu, diffusion, x_0=x_0, eps=eps, t=t)
    return HeldOut(x_t.to(device), t.to(device), images.labels.to(device), errors, band)


def _errors_on_cpu(diffusion: Diffusion, output: Tensor, *, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    return diffusion.errors(output.cpu(), x_0, eps, t)


def _validation_rows(num_images: int, generator: torch.Generator) -> Tensor:
    """Returns the images of the validation rows, (N,).

    A few images are repeated in random orders, so that each timestep has ten rows with images of different classes. Of
    very many images, some are chosen, because all rows are in memory.
    """
    if FEWEST_ROWS <= num_images <= MOST_ROWS:
        return torch.arange(num_images)
    orders = [torch.randperm(num_images, generator=generator) for _ in range(-(-FEWEST_ROWS // num_images))]
    return torch.cat(orders)[: MOST_ROWS if num_images > MOST_ROWS else FEWEST_ROWS]
