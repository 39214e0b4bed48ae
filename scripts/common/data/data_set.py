"""Loads labelled pictures as images of one size, and divides them into training, validation and test images.

A picture becomes an image as the service makes one from a picture of a client: the central square, resized. Images are
grey if all pictures are grey, and in colour otherwise. Nothing is written into the folder of the data.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.prepared_image import central_square
from scripts.common.data.arrays import IDX_NAME, read_idx, read_npz
from scripts.common.data.folders import SUFFIXES, read_folder, read_zip, walk
from scripts.common.data.parquet import read_parquet
from scripts.common.data.source import Picture, Source, printable
from scripts.common.errors import ScriptError
from scripts.common.progress import Reporter

LARGEST_IMAGE, USUAL_IMAGE = 64, 32  # pixels per side: the largest, and the default for pictures of several sizes
SIZE_UNIT = 4  # the network halves the image twice
HELD_OUT_SHARE = 0.1  # of the images of each class, if the data has no test images
HELD_OUT_SEED = 0
UNLEARNED_SHARE, MOST_UNLEARNED = 0.25, 1_000  # of the training images of each class: the share and the number
UNLEARNED_SEED = 0


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Images (N, C, H, W) uint8 and their labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, chosen: Tensor | slice) -> "ImageSet":
        """Returns the chosen images: a slice, a mask, or row numbers, whose order is kept."""
        return ImageSet(self.images[chosen], self.labels[chosen])


@dataclass(frozen=True, slots=True)
class DataSet:
    """Images of one size, with the names of their classes.

    `validate` and `test` are the same images if the data does not have both.
    """

    name: str
    class_names: tuple[str, ...]
    learn: ImageSet
    validate: ImageSet
    test: ImageSet
    ignored: Sequence[str] = ()  # files of other types
    known_as: str = ""  # describes the data instead of its digest

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        channels, height, width = self.learn.images.shape[1:]
        return channels, height, width

    @property
    def description(self) -> str:
        """Describes the data in a checkpoint. A run can be resumed only with the same description."""
        return self.known_as or f"{self.name}, {len(self.learn)} training images, SHA-256 {self.digest[:16]}"

    def limited(self, most: int | None) -> "DataSet":
        """Keeps the first `most` training images of each class (None: all), and all validation and test images."""
        if most is None:
            return self
        number = torch.zeros(len(self.learn), dtype=torch.int64)  # position of each image within its class
        for label in range(len(self.class_names)):
            is_of_class = self.learn.labels == label
            number[is_of_class] = torch.arange(int(is_of_class.sum()))
        known_as = self.known_as and f"{self.known_as}, at most {most} of each class"
        return replace(self, learn=self.learn.rows(number < most), known_as=known_as)

    def split_unlearned(self) -> tuple[ImageSet, ImageSet]:
        """Splits the training images into those from which an extractor learns, and others to measure distances with.

        The others are equally many of each class: at most a share of the smallest class, which may be none.
        """
        fewest = int(self.learn.labels.bincount(minlength=len(self.class_names)).min())
        return leave_out(self.learn, min(MOST_UNLEARNED, int(UNLEARNED_SHARE * fewest)))

    @property
    def digest(self) -> str:
        """The SHA-256 digest of all images and labels."""
        digest = hashlib.sha256()
        for each in (self.learn, self.validate, self.test):
            digest.update(each.images.numpy().tobytes())
            digest.update(each.labels.numpy().tobytes())
        return digest.hexdigest()


def leave_out(images: ImageSet, of_each: int) -> tuple[ImageSet, ImageSet]:
    """Splits images into those that an extractor learns, and `of_each` random others of each class.

    A network that has learned one of two sets of images sees them further apart than they are, so distances between
    real images are measured with images that it has not learned. Both parts keep the order of the images.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(UNLEARNED_SEED))
    is_left_out = torch.zeros(len(images), dtype=torch.bool)
    for label in images.labels.unique():
        is_left_out[order[images.labels[order] == label][:of_each]] = True
    return images.rows(~is_left_out), images.rows(is_left_out)


def digest_of(image: Tensor) -> bytes:
    """Returns the SHA-256 digest of the values of an image. Equal images have the same digest."""
    return hashlib.sha256(image.numpy().tobytes()).digest()


def digest_in(description: str) -> str:
    """Returns the digest in `DataSet.description`, or a description without one: the folder can get another name."""
    return description.rpartition(", SHA-256 ")[2]


def load_data(path: Path, reporter: Reporter, image_size: int | None = None) -> DataSet:
    """Loads the pictures of a folder, a zip file, Parquet files, an NPZ file or IDX files.

    The default of `image_size` is the size of the pictures if it is the same for all, and otherwise USUAL_IMAGE. Raises
    ScriptError if a picture or a label cannot be used.
    """
    try:
        return _load(path, reporter, image_size)
    except ScriptError as error:  # The message can have names of files, which are any bytes.
        raise ScriptError(printable(str(error))) from error


def _load(path: Path, reporter: Reporter, image_size: int | None) -> DataSet:
    source = read_source(path)
    if not source.pictures:
        raise ScriptError(f"{path} has no pictures. Add at least two of each class")
    sizes = _sizes_of(source.pictures, reporter)
    images = _images_of(source.pictures, image_size or _default_size(sizes), reporter)  # (N, C, S, S)
    labels = torch.tensor([picture.label for picture in source.pictures])
    rows = {split: _rows(source.pictures, split) for split in ("train", "val", "test")}
    if not (len(rows["val"]) or len(rows["test"])):
        rows["train"], rows["val"] = hold_out(labels, source.class_names, str(path))
    validate = rows["val"] if len(rows["val"]) else rows["test"]
    test = rows["test"] if len(rows["test"]) else rows["val"]
    everything = ImageSet(images, labels)
    learn, held_out = everything.rows(rows["train"]), everything.rows(validate)
    if missing := sorted(set(range(len(source.class_names))) - set(learn.labels.tolist())):
        raise ScriptError(f"{path}: the class {source.class_names[missing[0]]!r} has no images for training. Add some")
    tests = held_out if test is validate else everything.rows(test)
    return DataSet(printable(path.resolve().name), source.class_names, learn, held_out, tests, source.ignored)


def read_source(path: Path) -> Source:
    """Returns the pictures of a path, before they are decoded. Raises ScriptError."""
    if not path.exists():
        raise ScriptError(f"{path} does not exist")
    if path.is_dir():
        return _read_any_folder(path)
    if not path.is_file():  # reading from a pipe would wait without end
        raise ScriptError(f"{path} is neither a folder nor a file")
    path.open("rb").close()  # raises OSError if the file must not be read
    match path.suffix.lower():
        case ".parquet":
            return read_parquet(path, [path])
        case ".zip":
            return read_zip(path)
        case ".npz":
            return read_npz(path)
        case ".pkl" | ".pickle" | ".pt" | ".pth" | ".npy":
            raise ScriptError(
                f"{path} can contain Python objects, which run code when they are read. Save the arrays with "
                "numpy.savez as train_images and train_labels"
            )
    raise ScriptError(f"{path} is not a folder, a zip file, a Parquet file or an NPZ file")


def _read_any_folder(root: Path) -> Source:
    """Reads the Parquet files of a folder and of the folders in it, its IDX files, or otherwise its pictures.

    Raises ScriptError if it has both pictures and files of another kind, because it is not clear which are meant.
    """
    files = [folder / name for folder, _, names in walk(root) for name in names]
    parquet = sorted(file for file in files if file.suffix == ".parquet")
    idx = [file for file in files if file.parent == root and IDX_NAME.search(file.name)]
    pictures = [file for file in files if file.suffix.lower() in SUFFIXES]
    if pictures and (others := parquet or idx):
        raise ScriptError(
            f"{root} has {'Parquet' if parquet else 'IDX'} files, such as {others[0].relative_to(root)}, and pictures, "
            f"such as {pictures[0].relative_to(root)}. Choose a folder that has only one of these kinds"
        )
    if parquet:
        return read_parquet(root, parquet)
    return read_idx(root, idx) if idx else read_folder(root)


def hold_out(labels: Tensor, class_names: Sequence[str], place: str) -> tuple[Tensor, Tensor]:
    """Returns the rows for training and for validation: a share of each class, at least one image.

    The choice does not depend on the seed of the training. Raises ScriptError if a class has only one image.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(HELD_OUT_SEED))
    held_out = []
    for label, name in enumerate(class_names):
        rows = order[labels[order] == label]
        if len(rows) == 1:
            raise ScriptError(
                f"{place}: the class {name!r} has only one image. It needs at least two: one for training and one to "
                "measure the progress"
            )
        held_out.append(rows[: max(1, round(HELD_OUT_SHARE * len(rows)))])
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[torch.cat(held_out)] = True
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


def _rows(pictures: Sequence[Picture], split: str) -> Tensor:
    return torch.tensor([row for row, picture in enumerate(pictures) if picture.split == split], dtype=torch.int64)


def _sizes_of(pictures: Sequence[Picture], reporter: Reporter) -> set[tuple[int, int]]:
    """Returns all heights and widths that occur.

    Raises ScriptError if pictures cannot be used: for all of them at once, so that the user need not start again for
    each. Only decoding, which takes longer, can find further ones.
    """
    sizes = set[tuple[int, int]]()
    errors: list[str] = []
    with reporter.task("checking pictures", len(pictures), "pictures") as task:
        for picture in pictures:
            try:
                sizes.add(picture.size())
            except ScriptError as error:
                errors.append(str(error))
            task.advance(1)
    if not errors:
        return sizes
    others = len(errors) - 1
    more = f". {others} other picture{'s' if others > 1 else ''} cannot be used either" if others else ""
    raise ScriptError(errors[0] + more)


def _default_size(sizes: set[tuple[int, int]]) -> int:
    """Returns the side of the pictures if they are equal squares of a possible size, and otherwise USUAL_IMAGE."""
    height, width = next(iter(sizes))
    is_possible = height == width <= LARGEST_IMAGE and height % SIZE_UNIT == 0
    return height if len(sizes) == 1 and is_possible else USUAL_IMAGE


def _images_of(pictures: Sequence[Picture], size: int, reporter: Reporter) -> Tensor:
    """Returns the images (N, C, size, size) uint8."""
    images = np.empty((len(pictures), 3, size, size), np.uint8)
    with reporter.task("reading pictures", len(pictures), "pictures") as task:
        for place, picture in enumerate(pictures):
            images[place] = central_square(picture.decode(), size).pixels.numpy()
            task.advance(1)
    is_grey = all((image == image[:1]).all() for image in images)
    return torch.from_numpy(images[:, :1].copy() if is_grey else images)
