"""Describes data before the training: counts, sizes, duplicates and warnings, and a sheet with images of each class."""

from collections.abc import Iterator
from pathlib import Path

import torch

from model.files import write_atomically
from model.png import encode_pixels
from model.spec import looks_like_mnist
from scripts.common.data.data_set import DataSet, ImageSet, digest_of

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
    if looks_like_mnist(data.image_shape, data.class_names) and not data.known_as:
        yield (
            "note: the service takes grey images of 28x28 pixels with these names for handwritten digits, and centres "
            "drawings as in MNIST. If they show something else, give the classes other names, or serve the result of "
            "scripts.ship --normalisation none"
        )
    yield from repeated_images(data)
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


def repeated_images(data: DataSet) -> Iterator[str]:
    """Yields a warning for each set of held-out images of which some are also training images."""
    held_out = {"validation": data.validate} | ({} if data.test is data.validate else {"test": data.test})
    for name, images in held_out.items():
        if repeated := num_repeated(data.learn, images):
            yield f"warning: {repeated} of {len(images)} {name} images are also among the training images"


def num_repeated(one: ImageSet, other: ImageSet) -> int:
    """Returns the number of images of `other` that are also in `one`, pixel by pixel."""
    known = {digest_of(image) for image in one.images}
    return sum(digest_of(image) in known for image in other.images)


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
