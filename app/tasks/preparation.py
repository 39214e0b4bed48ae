"""Prepares pictures for a model: resizes them, normalises drawings as in MNIST, and estimates and restores noise.

The functions of `model` that do this need torch, whose import takes more than a second. They are imported when the
first picture is prepared, so that the tasks can be imported without torch.
"""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from app.engine.job import Pixels
from app.tasks.pictures import decode, decode_colour
from model.spec import Fit, Invert, ModelSpec

if TYPE_CHECKING:
    from model.prepared_image import PreparedImage

Image = npt.NDArray[np.float32]  # (C, H, W) in [-1, 1]
Mask = npt.NDArray[np.bool_]  # (1, H, W)


def decode_for(spec: ModelSpec, data: bytes) -> Pixels:
    """Decodes a picture in the colours of the images of the model: (H, W) or (H, W, 3). Raises PictureError."""
    return decode(data) if spec.image_shape[0] == 1 else decode_colour(data)


def prepare(spec: ModelSpec, picture: Pixels, fit: Fit, invert: Invert) -> "PreparedImage":
    """Converts a picture (H, W) or (H, W, 3) to an image of the model.

    Drawings are normalised as in MNIST if the model needs this (see `normalise` in model/digit_image.py). Otherwise the
    image is the central square of the picture.
    """
    if spec.normalises_drawings:
        from model.digit_image import normalise

        return normalise(picture, fit, invert)
    from model.prepared_image import central_square

    return central_square(picture, spec.image_shape[1], inverted=invert is True)


def resize_mask(spec: ModelSpec, mask: npt.NDArray[np.bool_]) -> Mask:
    """Returns the mask of the image of a picture with the mask (H, W): True at each pixel that it touches."""
    if spec.normalises_drawings:
        from model import digit_image

        return digit_image.resize_mask(mask).numpy()
    from model.prepared_image import central_mask

    return central_mask(mask, spec.image_shape[1]).numpy()


def enlargement_of(spec: ModelSpec, picture: Pixels) -> int:
    """Returns the factor by which an image was enlarged to this picture, or 1 if it was not."""
    from model import prepared_image

    return prepared_image.enlargement_of(picture, spec.image_shape[1])


def noise_std_of(spec: ModelSpec, image: "PreparedImage") -> float:
    """Returns the estimated standard deviation of the noise of an image, in grey levels."""
    from model.denoising import estimate_noise_std, estimate_noise_std_of_photo

    estimate = estimate_noise_std if spec.normalises_drawings else estimate_noise_std_of_photo
    return estimate(image.pixels[None]).item()


def restored(image: "PreparedImage", noise_std: float) -> Image:
    """Returns a noisy image with the values beyond black and white that were clipped."""
    from model.denoising import restored_image

    return restored_image(image.pixels[None], [noise_std])[0].numpy()
