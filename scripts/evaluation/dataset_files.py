"""The images of a data set, and the files of MNIST's IDX format and of PNG folders."""

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from model.files import write_atomically
from model.png import encode_pixels

IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")


class Rows(NamedTuple):
    """The images of a data set, in order."""

    images: np.ndarray  # uint8 (N, 28, 28)
    labels: np.ndarray  # int64 (N,)
    noise_index: np.ndarray  # int64 (N,)
    confidence: np.ndarray | None = None  # float32 (N,), the judge's probabilities of the labels; None without a filter


def write_idx(folder: Path, rows: Rows) -> None:
    """Writes the images and their labels as two IDX files."""
    header = struct.pack(">4i", 2051, *rows.images.shape)
    write_atomically(folder / IDX[0], header + rows.images.tobytes())
    labels = rows.labels.astype(np.uint8).tobytes()
    write_atomically(folder / IDX[1], struct.pack(">2i", 2049, len(labels)) + labels)


def write_pngs(folder: Path, rows: Rows) -> None:
    """Writes the images as PNGs, with one folder per digit. The files of a digit are numbered from 0."""
    written: dict[int, int] = {}
    for image, label in zip(rows.images, rows.labels.tolist(), strict=True):
        number = written.get(label, 0)
        written[label] = number + 1
        write_atomically(folder / str(label) / f"{number:05d}.png", encode_pixels(image))
