"""Compares pictures with prompts by CLIP. This task uses no steps of the engine."""

from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from app.engine.interface import ModelInfo
from app.engine.job import Pixels
from app.tasks.fields import Prompt
from app.tasks.from_image import FittingFields
from app.tasks.picture_files import MAX_SIDE, PictureError
from app.tasks.pictures import decode
from app.tasks.preparation import decode_for, prepare
from app.tasks.sampling import TimedFields
from model.spec import EMBEDDED

if TYPE_CHECKING:
    from model.prepared_image import PreparedImage

MAX_IMAGES, MAX_PROMPTS = 64, 16
MAX_PIXELS = MAX_SIDE**2  # of all pictures of a request
REAL_DIGITS = EMBEDDED / "digits.png"  # written by scripts/train_clip.py: one row of images for each class
SIZE = 28  # pixels per side of an image of REAL_DIGITS


class ScoreFields(TimedFields, FittingFields):
    """The fields of a request to compare pictures with prompts, without the pictures."""

    prompts: Annotated[
        list[Prompt],
        Field(
            min_length=1,
            max_length=MAX_PROMPTS,
            description="The prompts, such as `a handwritten digit seven`. The model ignores words after its context "
            "length.",
        ),
    ]


class SeveralPictures:
    """Reads the pictures of a request one after the other. Limits their total size to MAX_PIXELS."""

    def __init__(self) -> None:
        self._num_pixels = 0

    def read(self, checked: tuple[FittingFields, ModelInfo], data: bytes) -> "PreparedImage":
        """Converts the next picture to an image of the model.

        Raises PictureError, also if all pictures together are too large.
        """
        fields, info = checked
        picture = decode_for(info, data)
        self._num_pixels += picture.shape[0] * picture.shape[1]
        if self._num_pixels > MAX_PIXELS:
            raise PictureError(
                f"This picture and those before it together exceed {MAX_PIXELS} pixels. Send fewer or smaller pictures"
            )
        return prepare(info, picture, fields.fit, fields.invert)


def read_real_digits() -> list[list[Pixels]]:
    """Returns the real digits (28, 28) of each class: the 100 images of MNIST with which prompts are compared."""
    rows = np.vsplit(decode(REAL_DIGITS.read_bytes()), 10)
    return [np.hsplit(row, row.shape[1] // SIZE) for row in rows]
