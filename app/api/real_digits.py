"""Reads the real digits whose similarities /score returns: 100 images of MNIST that ship with the CLIP model."""

import numpy as np

from app.api.pictures import decode
from app.engine.job import Pixels
from model.clip import EMBEDDED

FILE = EMBEDDED / "digits.png"  # written by scripts/train_clip.py: one row of images for each class
SIZE = 28  # pixels per side of an image


def read_real_digits() -> list[list[Pixels]]:
    """Returns the images (28, 28) of each class."""
    rows = np.vsplit(decode(FILE.read_bytes()).grey, 10)
    return [np.hsplit(row, row.shape[1] // SIZE) for row in rows]
