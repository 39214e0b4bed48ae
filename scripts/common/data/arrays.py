"""Reads NPZ files in the layout of MedMNIST, and IDX files as those of MNIST, of any image size."""

import gzip
import re
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from scripts.common.data.folders import ZIP_METHODS
from scripts.common.data.source import MAX_CLASSES, Picture, Source, Split, numbered, split_in
from scripts.common.errors import ScriptError

UNREADABLE = (ValueError, OSError, zipfile.BadZipFile, zlib.error, EOFError)
MAX_ARRAY_BYTES = 4 * 2**30  # of all arrays of a file together, decompressed
IDX_NAME = re.compile(r"images.idx3-ubyte(\.gz)?$")  # end of the name of a file with images


def read_npz(path: Path) -> Source:
    """Reads the arrays `train_images` (N, H, W) or (N, H, W, 3), `train_labels` (N,) or (N, 1), and those of the splits
    `val` and `test`, if there are any. `class_names` names the classes. Raises ScriptError.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check_size(path, sum(entry.file_size for entry in archive.infolist()))
            if any(entry.compress_type not in ZIP_METHODS for entry in archive.infolist()):
                raise ScriptError(f"{path} is not compressed by deflate. Save it with numpy.savez_compressed")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in file.files}
    # TypeError: the file has a single array. RuntimeError: it is encrypted. TokenError, MemoryError and OverflowError:
    # the type or the shape of an array is damaged.
    except (*UNREADABLE, TypeError, RuntimeError, tokenize.TokenError, MemoryError, OverflowError) as error:
        is_pickle = "pickle" in str(error).lower()
        hint = "It contains Python objects, which can run code" if is_pickle else "It is damaged, or no NPZ file"
        raise ScriptError(f"{path} cannot be read. {hint}. Save arrays of numbers with numpy.savez") from error
    if "train_images" not in arrays:
        raise ScriptError(f"{path} has no array 'train_images'. Its arrays are {', '.join(sorted(arrays)) or 'none'}")
    pictures: list[Picture] = []
    for split in ("train", "val", "test"):
        if f"{split}_images" in arrays:
            pictures += _pictures(f"{path}: {split}", split, arrays[f"{split}_images"], arrays.get(f"{split}_labels"))
    return numbered(str(path), pictures, _names_of(path, arrays.get("class_names")))


def _names_of(path: Path, names: np.ndarray | None) -> list[str] | None:
    if names is None:
        return None
    if names.ndim != 1:
        raise ScriptError(
            f"{path}: class_names has the shape {names.shape}. It must be an array with one name per class"
        )
    # check_names refuses names that are not valid UTF-8
    return [name.decode(errors="surrogateescape") if isinstance(name, bytes) else str(name) for name in names.tolist()]


def read_idx(folder: Path, files: Sequence[Path]) -> Source:
    """Reads IDX files with images, and the files of the folder with their labels, all with or without `.gz`.

    Their names contain the split. Raises ScriptError.
    """
    names: dict[Split, str] = {}
    pictures: list[Picture] = []
    for name in sorted({path.name.removesuffix(".gz") for path in files}):
        split = split_in(name)
        if split is None:
            raise ScriptError(
                f"{folder}: the name {name} does not say what the images are for. Add 'train-' or 'test-'"
            )
        if (other := names.setdefault(split, name)) != name:
            raise ScriptError(
                f"{folder}: {other} and {name} both have images for the split {split!r}. Put each data set into a "
                "folder of its own"
            )
        images, labels = (_idx(_idx_file(folder, each)) for each in (name, _labels_of(name)))
        pictures += _pictures(f"{folder}: {name}", split, images, labels)
    return numbered(str(folder), pictures, None)


def _labels_of(name: str) -> str:
    return name.replace("images", "labels").replace("idx3", "idx1")


def _idx_file(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    raise ScriptError(f"{folder} has no file {name}, with the labels of the images. Add it")


def _idx(path: Path) -> np.ndarray:
    from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor

    with tempfile.NamedTemporaryFile() as plain:  # torchvision reads only uncompressed files
        size = 0
        for part in _parts_of(path):
            size += len(part)
            _check_size(path, size)
            plain.write(part)
        plain.flush()
        try:
            return read_sn3_pascalvincent_tensor(plain.name, strict=False).numpy()
        except (ValueError, AssertionError, KeyError, RuntimeError) as error:
            raise _damaged(path) from error


def _parts_of(path: Path) -> Iterator[bytes]:
    """Yields the decompressed content of a file. Raises OSError if the file cannot be opened."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            while part := file.read(2**20):
                yield part
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise _damaged(path) from error


def _damaged(path: Path) -> ScriptError:
    return ScriptError(f"{path} is not an IDX file, or is damaged. Download or write it again")


def _check_size(path: Path, size: int) -> None:
    if size > MAX_ARRAY_BYTES:
        raise ScriptError(f"{path} has more than {MAX_ARRAY_BYTES >> 30} GiB of data. Use fewer or smaller images")


def _pictures(place: str, split: Split, images: np.ndarray, labels: Any) -> Iterator[Picture]:
    """Yields the pictures of arrays. Raises ScriptError if they are not pictures with one label each."""
    is_grey, is_colour = images.ndim == 3, images.ndim == 4 and images.shape[-1] == 3
    if images.dtype != np.uint8 or not (is_grey or is_colour) or 0 in images.shape[1:]:
        raise ScriptError(
            f"{place}: the images have the type {images.dtype} and the shape {images.shape}. They must be uint8 of the "
            "shape (N, H, W) or (N, H, W, 3)"
        )
    if labels is None:
        raise ScriptError(f"{place}: the images have no labels. Training needs one label for each image")
    if labels.ndim == 2 and labels.shape[1] > 1:
        raise ScriptError(f"{place}: an image has {labels.shape[1]} labels. Training needs one label for each image")
    labels = labels.reshape(-1)
    if len(labels) != len(images) or labels.dtype.kind not in "iu":
        raise ScriptError(
            f"{place}: {len(images)} images and {len(labels)} labels of the type {labels.dtype}. Each image needs one "
            "label, which is a whole number from 0"
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < MAX_CLASSES:
        raise ScriptError(
            f"{place}: the labels are {labels.min()} to {labels.max()}. They must be 0 to at most {MAX_CLASSES - 1}"
        )
    for number, label in enumerate(labels.tolist()):
        yield Picture(f"{place}, image {number}", split, label, partial(images.__getitem__, number))
