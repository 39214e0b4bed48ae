"""Writes the losses and the images of each epoch for TensorBoard, which shows them while the training runs."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

from torch import Tensor

from model.pixels import to_pixels
from scripts.common.progress import require
from scripts.training.trainer import EpochResult

TENSORBOARD = "tensorboard"  # the folder in the run folder


def tensorboard_writer(folder: Path) -> Callable[[EpochResult, Tensor], None]:
    """Returns a function that writes an epoch and its images (N, C, H, W) in [-1, 1].

    A resumed run writes to the same folder. If TensorBoard is missing, exits with the command that installs it.
    """
    require("tensorboard", extra="tensorboard")
    open_writer = cache(require("torch.utils.tensorboard").SummaryWriter)

    def write(result: EpochResult, images: Tensor) -> None:
        writer = open_writer(str(folder))  # not earlier, because the folder may have a run with other data
        writer.add_scalar("loss/training", result.train_loss, result.epoch)
        writer.add_scalar("loss/validation", result.validation_loss, result.epoch)
        for number, loss in enumerate(result.band_losses, 1):
            writer.add_scalar(f"validation loss by quarter of the timesteps/{number}", loss, result.epoch)
        writer.add_scalar("learning rate", result.learning_rate, result.epoch)
        writer.add_images("images", to_pixels(images).cpu(), result.epoch)
        writer.flush()

    return write
