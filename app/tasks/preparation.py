"""Prepares pictures for a model: resizes them, normalises drawings as in MNIST, and estimates and restores noise.

The functions of `model` that do this need torch, whose import takes more than a second. They are imported when the
first picture is prepared, so that the tasks can be imported without torch.
"""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from app.engine.job import Pixels
from model.spec import Fit, Invert

if TYPE_CHECKING:
    from model.digit_image import DigitImage

Image = npt.NDArray[np.float32]  # (1, H, W) in [-1, 1]
Mask = npt.NDArray[np.bool_]  # (1, H, W)


def prepare(grey: Pixels, fit: Fit, invert: Invert) -> "DigitImage":
    """Converts a picture (H, W) to an image (see `normalise` in model/digit_image.py)."""
    from model.digit_image import normalise

    return normalise(grey, fit, invert)


def resize_mask(mask: npt.NDArray[np.bool_]) -> Mask:
    """Returns the mask of the image of a picture with the mask (H, W): True at each pixel that it touches."""
    from model import digit_image

    return digit_image.resize_mask(mask).numpy()


def enlargement_of(grey: Pixels) -> int:
    """Returns the factor by which an image was enlarged to this picture (H, W), or 1 if it was not."""
    from model import digit_image

    return digit_image.enlargement_of(grey)


def noise_std_of(image: "DigitImage") -> float:
    """Returns the estimated standard deviation of the noise of an image, in grey levels."""
    from model.denoising import estimate_noise_std

    return estimate_noise_std(image.pixels[None]).item()


def restored(image: "DigitImage", noise_std: float) -> Image:
    """Returns a noisy image with the values beyond black and white that were clipped."""
    from model.denoising import restored_image

    return restored_image(image.pixels[None], [noise_std])[0].numpy()
