"""Loads the images to evaluate, from a checkpoint or from a folder, and the real images to compare with."""

import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from model.pixels import to_pixels
from model.spec import DIGITS
from scripts.common.data.data_set import DataSet, ImageSet
from scripts.common.drawing import Drawer, DrawingOptions, DrawingRequest, open_drawer, options_from
from scripts.common.errors import ScriptError
from scripts.common.mnist import NUM_CLASSES, UNLEARNED_OF_EACH, load_mnist, split_unlearned, split_validation
from scripts.common.progress import Reporter
from scripts.evaluation.dataset_files import IDX
from scripts.evaluation.parquet import find_parquet, read_parquet

FEWEST_OF_EACH = 10  # images of each digit; precision, recall and coverage need several neighbours
MOST_PICTURES = 49_000  # of own data in an evaluation
MOST_IMAGES = NUM_CLASSES * UNLEARNED_OF_EACH  # images are compared with the same number of real digits
HELD_OUT_SPLITS = ("test", "validation")
SPLITS = (*HELD_OUT_SPLITS, "training")
HELD_OUT = "held-out"  # name of the split in evaluations of your own data
FACTS = "dataset.json"  # written by scripts.make_dataset: the checkpoint and the options of the images
# The facts that determine the images.
SOURCE = ("weights_sha256", "options", "seed", "device", "dtype", "compiled", "min_confidence", "judge_sha256")
NUM_IMAGES = 10_000  # default number of images to evaluate
NAMED = re.compile(r"digit-(\d)-")  # file names in ZIP answers of the service and in folders of scripts.sample


@dataclass(frozen=True, slots=True)
class References:
    """The real images of an evaluation."""

    real: ImageSet  # training images, which give the metrics of real images
    held_out: ImageSet  # the images to compare with
    name: str  # split of the held-out images
    learned: ImageSet  # all training images that are not held out, of which copies are counted
    class_names: tuple[str, ...] = DIGITS


@dataclass(frozen=True, slots=True)
class Samples:
    """The images to evaluate, with the requested labels.

    `get` returns them with the facts of SOURCE, and may have to generate them first.
    """

    num_images: int
    get: Callable[[], tuple[ImageSet, dict[str, Any]]]


def samples_of_folder(folder: Path, num_images: int | None, reporter: Reporter) -> Samples:
    """Reads `num_images` digits of a folder, equally many of each digit.

    None means as many as possible, at most NUM_IMAGES. Raises ScriptError if the folder has too few.
    """
    read, facts = read_samples(folder), read_facts(folder)
    fewest = int(read.labels.bincount(minlength=NUM_CLASSES).min())
    digits = balanced(read, num_images or min(NUM_IMAGES, NUM_CLASSES * fewest))
    if len(digits.labels) < len(read.labels):
        each = len(digits.labels) // NUM_CLASSES
        reporter.line(f"Using the first {each} images of each digit, of {len(read.labels)} images in {folder}")
    known = {name: facts[name] for name in SOURCE if name in facts}
    return Samples(len(digits.labels), lambda: (digits, {"images": folder.name, **known}))


def samples_of_checkpoint(request: DrawingRequest, num_images: int | None, reporter: Reporter) -> Samples:
    """Loads the checkpoint and checks the options. None means NUM_IMAGES. Raises CheckpointError or ScriptError."""
    drawer, count = open_drawer(request), num_images or NUM_IMAGES
    check_digits(drawer)
    return samples_of_drawer(drawer, request, count, reporter)


def samples_of_drawer(drawer: Drawer, request: DrawingRequest, count: int, reporter: Reporter) -> Samples:
    """Checks the options now and generates the images in `get`. Raises ScriptError for options not permitted."""
    options = options_from(request, drawer.checkpoint)

    def get() -> tuple[ImageSet, dict[str, Any]]:
        drawer.compile(request.compile, reporter)
        source = {**drawer.facts, "options": options.facts, "seed": request.seed}
        given = {"num_images": count, "seed": request.seed, "batch_size": request.batch_size}
        return draw_samples(drawer, options, reporter, **given), source

    return Samples(count, get)


def draw_samples(
    drawer: Drawer, options: DrawingOptions, reporter: Reporter, *, num_images: int, seed: int, batch_size: int
) -> ImageSet:
    """Generates `num_images` images, equally many of each class, with 8-bit pixels like those of the service."""
    labels = torch.arange(num_images) % len(drawer.class_names)  # (N,)
    index = torch.arange(num_images)
    x_0 = drawer.draw(labels, index, options, reporter, seed=seed, batch_size=batch_size)
    return ImageSet(to_pixels(x_0), labels)


def check_digits(drawer: Drawer) -> None:
    """Raises ScriptError unless the checkpoint generates ten classes of 28x28 images."""
    if drawer.checkpoint.image_shape != (1, 28, 28) or len(drawer.class_names) != NUM_CLASSES:
        raise ScriptError(
            f"The checkpoint must generate {NUM_CLASSES} classes of 1x28x28 images, {generated_images(drawer)}"
        )


def generated_images(drawer: Drawer) -> str:
    """Returns the end of an error message: the number of classes and the image shape of the checkpoint."""
    shape = "x".join(map(str, drawer.checkpoint.image_shape))
    return f"but it generates {len(drawer.class_names)} classes of {shape} images"


def read_samples(folder: Path) -> ImageSet:
    """Returns the digits of a folder with IDX files, Parquet files or PNGs. Raises ScriptError for other content.

    Parquet files must be in the folder `data` and have the names of the split `train` on the Hugging Face Hub. PNGs
    must have names such as `digit-<d>-….png`, or be in folders named 0 to 9.
    """
    if (folder / IDX[0]).exists():
        digits = _read_idx(folder)
    elif paths := find_parquet(folder):
        images, labels = read_parquet(paths)
        pixels = np.stack([_decode(io.BytesIO(content), name) for name, content in images])
        digits = ImageSet(torch.from_numpy(pixels)[:, None], torch.from_numpy(labels))
    else:
        digits = _read_pngs(folder)
    counts = digits.labels.bincount(minlength=NUM_CLASSES)
    if counts.min() < FEWEST_OF_EACH:
        digit = int(counts.argmin())
        raise ScriptError(f"{folder} has {counts[digit]} images of digit {digit}, at least {FEWEST_OF_EACH} are needed")
    return digits


def read_facts(folder: Path) -> dict[str, Any]:
    """Returns the facts that scripts.make_dataset or scripts.collect wrote to the folder. Empty without such a file."""
    try:
        facts: dict[str, Any] = json.loads((folder / FACTS).read_text("utf-8"))
    except OSError:
        return {}
    except ValueError as error:
        raise ScriptError(f"{folder / FACTS} is not valid JSON. Delete it to evaluate the images without it") from error
    return facts


def _read_idx(folder: Path) -> ImageSet:
    from torchvision.datasets.mnist import read_image_file, read_label_file

    try:
        images, labels = read_image_file(str(folder / IDX[0])), read_label_file(str(folder / IDX[1]))
    except (OSError, ValueError, AssertionError, KeyError) as error:
        raise ScriptError(f"Cannot read {IDX[0]} and {IDX[1]} in {folder}: not valid IDX files") from error
    if len(images) != len(labels) or not len(labels) or labels.max() >= NUM_CLASSES:
        raise ScriptError(
            f"The IDX files in {folder} are inconsistent: {len(images)} images, {len(labels)} labels. "
            "They must have one label from 0 to 9 per image"
        )
    return ImageSet(images[:, None], labels)


def _read_pngs(folder: Path) -> ImageSet:
    paths = sorted(folder.rglob("*.png"))
    if not paths:
        raise ScriptError(f"{folder} has no PNG, IDX or Parquet files")
    images, labels = [], []
    for path in paths:
        labels.append(_digit_of(path))
        images.append(_decode(path, str(path)))
    return ImageSet(torch.from_numpy(np.stack(images))[:, None], torch.tensor(labels))


def most_images(split: str) -> int:
    """Returns the largest number of images that can be compared with a split."""
    return MOST_IMAGES // 2 if split == "training" else MOST_IMAGES


def load_references(split: str, data_dir: Path) -> References:
    """Loads the digits of a split, and training digits (MNIST's training file without its last 5,000 images).

    The real digits are those of `split_unlearned`, which extractor and CLIP have not learned. `validation` is
    the last 5,000 images, which are by few writers. `training` is half of the real digits, which are by all writers,
    and compares with the other half. `test` is for published figures and must not be used to choose settings. All sets
    are shuffled with a fixed seed, since the files are ordered by writer.
    """
    train, validation = split_validation(*load_mnist("train", data_dir))
    learned, unlearned = (_shuffled(*each) for each in split_unlearned(*train))
    if split == "training":
        real, held_out = _halves(unlearned)
        return References(real, held_out, split, _together(learned, real))
    held_out = _shuffled(*(validation if split == "validation" else load_mnist("test", data_dir)))
    return References(unlearned, held_out, split, _together(learned, unlearned))


def references_of(data: DataSet) -> References:
    """Returns the training images that the extractor has not learned, and the test images to compare with, shuffled."""
    unlearned = data.split_unlearned()[1]
    real, held_out, learned = (_shuffled(each.images, each.labels) for each in (unlearned, data.test, data.learn))
    return References(real, held_out, HELD_OUT, learned, data.class_names)


def _halves(images: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Returns two halves with the same number of images of each class."""
    ordered = balanced(images, len(images))
    half = len(ordered) // (2 * NUM_CLASSES) * NUM_CLASSES
    return ordered.rows(slice(half)), ordered.rows(slice(half, None))


def _together(first: ImageSet, second: ImageSet) -> ImageSet:
    return ImageSet(torch.cat([first.images, second.images]), torch.cat([first.labels, second.labels]))


def _shuffled(images: Tensor, labels: Tensor) -> ImageSet:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return ImageSet(images[order], labels[order])


def balanced(images: ImageSet, count: int, num_classes: int = NUM_CLASSES) -> ImageSet:
    """Returns the first count / K images of each of K classes, in the order 0 to K - 1, 0 to K - 1, ...

    Raises ScriptError if there are too few.
    """
    each = count // num_classes
    rows = [(images.labels == label).nonzero()[:each, 0] for label in range(num_classes)]
    fewest = min(len(of_class) for of_class in rows)
    if fewest < each:
        raise ScriptError(f"Too few images: {fewest} of one class, but {each} images of each class are needed")
    return images.rows(torch.stack(rows, dim=1).flatten())


def _digit_of(path: Path) -> int:
    named = NAMED.match(path.name)
    if named:
        return int(named[1])
    if path.parent.name in map(str, range(NUM_CLASSES)):
        return int(path.parent.name)
    raise ScriptError(f"{path}: unknown digit. Name the file digit-<d>-….png, or move it to a folder named 0 to 9")


def _decode(file: Path | io.BytesIO, name: str) -> np.ndarray:
    """Returns the pixels of a picture, uint8 (28, 28). `name` identifies the picture in errors."""
    try:
        with Image.open(file) as image:
            mode, pixels = image.mode, np.asarray(image)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise ScriptError(f"{name} cannot be read as a PNG") from error
    if pixels.shape != (28, 28) or mode != "L":  # NumPy would read palette indices as grey levels
        raise ScriptError(f"{name} is not an 8-bit grey image of 28x28 pixels")
    return pixels
