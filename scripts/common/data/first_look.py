"""Describes data before the training: counts, sizes, duplicates and warnings, and a sheet with images of each class."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch

from model.files import write_atomically
from model.png import encode_pixels
from scripts.common.data.data_set import DataSet, ImageSet

FEW_IMAGES = 100  # of a class; with fewer, a network mostly repeats the training images
UNEQUAL = 5  # the largest class, in multiples of the smallest one
SHEET_CLASSES, SHEET_COLUMNS = 40, 12
MOST_LINES = 20  # classes that are listed


def lines_about(data: DataSet) -> Iterator[str]:
    """Yields lines for the user. Warnings come last."""
    channels, side, _ = data.image_shape
    counts = data.learn.labels.bincount(minlength=len(data.class_names)).tolist()
    classes = "1 class" if len(counts) == 1 else f"{len(counts)} classes"
    held_out = f"{len(data.validate)} for validation"
    if data.test is not data.validate:
        held_out += f", {len(data.test)} for tests"
    kind = "grey" if channels == 1 else "colour"
    yield f"{data.name}: {classes}, {len(data.learn)} images for training, {held_out}, {side}x{side} pixels, {kind}"
    shown = sorted(zip(data.class_names, counts, strict=True), key=lambda each: -each[1])[:MOST_LINES]
    others = f" and {len(counts) - len(shown)} more classes" if len(shown) < len(counts) else ""
    yield f"images of each class: {', '.join(f'{name} {count}' for name, count in shown)}{others}"
    if data.ignored:
        yield f"ignored files of other types: {len(data.ignored)}, such as {data.ignored[0]}"
    if repeated := num_repeated(data.learn, data.validate):
        yield f"warning: {repeated} of {len(data.validate)} validation images are also among the training images"
    smallest, largest = min(counts), max(counts)
    if smallest < FEW_IMAGES:
        name = data.class_names[counts.index(smallest)]
        yield (
            f"warning: the class {name!r} has only {smallest} image{'s' * (smallest > 1)}. With fewer than "
            f"{FEW_IMAGES}, the network mostly repeats the training images"
        )
    if largest > UNEQUAL * smallest:
        yield (
            f"warning: the largest class has {largest} images and the smallest {smallest}. Generated images of small "
            "classes will look worse"
        )


def num_repeated(one: ImageSet, other: ImageSet) -> int:
    """Returns the number of images of `other` that are also in `one`, pixel by pixel."""
    known = {_digest(image) for image in one.images}
    return sum(_digest(image) in known for image in other.images)


def save_sheet(data: DataSet, path: Path) -> None:
    """Writes a PNG with a row of training images for each of the first classes."""
    rows = []
    for label in range(min(len(data.class_names), SHEET_CLASSES)):
        images = data.learn.images[data.learn.labels == label][:SHEET_COLUMNS]
        empty = images.new_zeros((SHEET_COLUMNS - len(images), *images.shape[1:]))
        rows.append(torch.cat([*images, *empty], dim=2))  # (C, H, columns * W)
    sheet = torch.cat(rows, dim=1).permute(1, 2, 0)  # (rows * H, columns * W, C)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, encode_pixels(sheet.numpy(), scale=2))


def _digest(image: torch.Tensor) -> bytes:
    return hashlib.sha256(image.numpy().tobytes()).digest()
