"""The digits that are evaluated: drawn by a checkpoint, or read from a folder."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from model.pixels import to_pixels
from scripts.common.drawing import Drawer, DrawingOptions, DrawingRequest, open_drawer, options_from
from scripts.common.errors import ScriptError
from scripts.common.mnist import NUM_CLASSES, load_mnist, split_validation
from scripts.common.progress import Reporter

FEWEST_OF_EACH = 10  # that neighbours can be looked for among
MOST_IMAGES = 49_000  # so that as many learned digits, as many of each, stand beside them
IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
NUM_COMPARED = 20_000  # learned digits that stand for the held-out ones where those of the training split are asked for
HELD_OUT_SPLITS = ("test", "validation")
SPLITS = (*HELD_OUT_SPLITS, "training")
FACTS = "dataset.json"  # in a folder that scripts.make_dataset wrote: what its images were drawn with
SOURCE = ("weights_sha256", "options", "seed", "device", "dtype", "compiled")  # the facts that decide the images
NUM_IMAGES = 10_000  # evaluated by default
NAMED = re.compile(r"digit-(\d)-")  # as in the service's zip and in `scripts.sample`'s folders


class Digits(NamedTuple):
    """Images and what they are, or were asked to be."""

    images: Tensor  # uint8 (N, 1, 28, 28)
    labels: Tensor  # int64 (N,)


@dataclass(frozen=True, slots=True)
class References:
    """Real digits: those that are compared with, and others that were learned from, which make the floor."""

    learned: Digits
    held_out: Digits
    name: str  # of the split that was held out
    all_learned: Digits  # what may have been memorised: more than `learned` where that split was learned from too


@dataclass(frozen=True, slots=True)
class Samples:
    """The digits to evaluate. `get` draws them, which is slow, and returns them with the facts of SOURCE."""

    num_images: int
    get: Callable[[], tuple[Digits, dict[str, Any]]]


def samples_of_folder(folder: Path, num_images: int | None, reporter: Reporter) -> Samples:
    """Reads `num_images` digits of a folder, equally many of each; None: as many as possible, at most NUM_IMAGES.

    Raises ScriptError if the folder has too few.
    """
    read, facts = read_samples(folder), read_facts(folder)
    fewest = int(read.labels.bincount(minlength=NUM_CLASSES).min())
    digits = balanced(read, num_images or min(NUM_IMAGES, NUM_CLASSES * fewest))
    if len(digits.labels) < len(read.labels):
        reporter.line(f"the first {len(digits.labels) // NUM_CLASSES} of each digit, of {len(read.labels)} images")
    known = {name: facts[name] for name in SOURCE if name in facts}
    return Samples(len(digits.labels), lambda: (digits, {"images": folder.name, **known}))


def samples_of_checkpoint(request: DrawingRequest, num_images: int | None, reporter: Reporter) -> Samples:
    """Loads the checkpoint and checks the options. Raises CheckpointError or ScriptError."""
    drawer, count = open_drawer(request), num_images or NUM_IMAGES
    options = options_from(request, drawer.checkpoint)

    def get() -> tuple[Digits, dict[str, Any]]:
        drawer.compile(request.compile, reporter)
        source = {**drawer.facts, "options": asdict(options), "seed": request.seed}
        given = {"num_images": count, "seed": request.seed, "batch_size": request.batch_size}
        return draw_samples(drawer, options, reporter, **given), source

    return Samples(count, get)


def draw_samples(
    drawer: Drawer, options: DrawingOptions, reporter: Reporter, *, num_images: int, seed: int, batch_size: int
) -> Digits:
    """num_images digits, as many of each, in 8 bits as they would be served."""
    if drawer.checkpoint.image_shape != (1, 28, 28) or len(drawer.class_names) != NUM_CLASSES:
        raise ScriptError("this checkpoint does not draw digits of 1x28x28, and nothing else is known here")
    labels = torch.arange(num_images) % NUM_CLASSES  # (N,)
    index = torch.arange(num_images)
    x_0 = drawer.draw(labels, index, options, reporter, seed=seed, batch_size=batch_size)
    return Digits(to_pixels(x_0), labels)


def read_samples(folder: Path) -> Digits:
    """Returns the digits of a folder with IDX files or PNGs; ScriptError for other content.

    PNGs have names such as `digit-<d>-….png`, or are in folders named 0 to 9.
    """
    digits = _read_idx(folder) if (folder / IDX[0]).exists() else _read_pngs(folder)
    counts = digits.labels.bincount(minlength=NUM_CLASSES)
    if counts.min() < FEWEST_OF_EACH:
        scarce = int(counts.argmin())
        raise ScriptError(f"{folder} holds {counts[scarce]} images of a {scarce}: {FEWEST_OF_EACH} of each are needed")
    return digits


def read_facts(folder: Path) -> dict[str, Any]:
    """Which checkpoint drew the images of a folder, and how, as far as scripts.make_dataset has left it there."""
    try:
        facts: dict[str, Any] = json.loads((folder / FACTS).read_text("utf-8"))
    except OSError:
        return {}
    except ValueError as error:
        raise ScriptError(f"{folder / FACTS} is not JSON") from error
    return facts


def _read_idx(folder: Path) -> Digits:
    from torchvision.datasets.mnist import read_image_file, read_label_file

    try:
        images, labels = read_image_file(str(folder / IDX[0])), read_label_file(str(folder / IDX[1]))
    except (OSError, ValueError, AssertionError, KeyError) as error:
        raise ScriptError(f"{folder} does not hold the IDX files that scripts.make_dataset writes") from error
    if len(images) != len(labels) or not len(labels) or labels.max() >= NUM_CLASSES:
        raise ScriptError(f"{folder} holds {len(images)} images and labels that do not fit them")
    return Digits(images[:, None], labels)


def _read_pngs(folder: Path) -> Digits:
    paths = sorted(folder.rglob("*.png"))
    if not paths:
        raise ScriptError(f"{folder} holds no PNG and no IDX files")
    images, labels = [], []
    for path in paths:
        labels.append(_digit_of(path))
        images.append(_read(path))
    return Digits(torch.from_numpy(np.stack(images))[:, None], torch.tensor(labels))


def load_references(split: str, data_dir: Path) -> References:
    """MNIST's training images less the last 5,000, and those that are held out: a split of SPLITS.

    Each in an order of its own, always the same: the files begin with other writers than they end with. So
    validation is of few writers; training, 20,000 of the learned digits, is of all, and nobody saw the test split.
    """
    train, validation = split_validation(*load_mnist("train", data_dir))
    learned = _shuffled(*train)
    if split == "training":
        of_all, rest = (
            Digits(*(part[rows] for part in learned)) for rows in (slice(NUM_COMPARED), slice(NUM_COMPARED, None))
        )
        return References(rest, of_all, split, learned)
    held_out = _shuffled(*(validation if split == "validation" else load_mnist("test", data_dir)))
    return References(learned, held_out, split, learned)


def _shuffled(images: Tensor, labels: Tensor) -> Digits:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return Digits(images[order], labels[order])


def balanced(digits: Digits, count: int) -> Digits:
    """Returns the first count / 10 images of each digit, in turn; ScriptError if there are too few."""
    each = count // NUM_CLASSES
    rows = [(digits.labels == digit).nonzero()[:each, 0] for digit in range(NUM_CLASSES)]
    fewest = min(len(of_digit) for of_digit in rows)
    if fewest < each:
        raise ScriptError(f"{each} images of each digit are needed, and of one there are {fewest}")
    order = torch.stack(rows, dim=1).flatten()  # (count,)
    return Digits(digits.images[order], digits.labels[order])


def _digit_of(path: Path) -> int:
    named = NAMED.match(path.name)
    if named:
        return int(named[1])
    if path.parent.name in map(str, range(NUM_CLASSES)):
        return int(path.parent.name)
    raise ScriptError(f"{path} does not say its digit: name it digit-<d>-….png, or put it into a folder 0 to 9")


def _read(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            mode, pixels = image.mode, np.asarray(image)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise ScriptError(f"{path} cannot be read as a PNG") from error
    if pixels.shape != (28, 28) or mode != "L":  # a palette's indices would look like grey
        raise ScriptError(f"{path} is not an 8-bit grey image of 28x28")
    return pixels
