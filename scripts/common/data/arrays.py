"""Reads NPZ files in the layout of MedMNIST, and IDX files as those of MNIST, of any image size."""

import gzip
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from scripts.common.data.source import MAX_CLASSES, Picture, Source, Split, numbered
from scripts.common.errors import ScriptError

IDX_SPLITS: dict[Split, tuple[str, ...]] = {"train": ("train",), "test": ("t10k", "test")}


def read_npz(path: Path) -> Source:
    """Reads the arrays `train_images` (N, H, W) or (N, H, W, 3), `train_labels` (N,) or (N, 1), and those of the splits
    `val` and `test`, if there are any. `class_names` names the classes. Raises ScriptError.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        hint = "It contains Python objects, which can run code" if "pickle" in str(error).lower() else "It is damaged"
        raise ScriptError(f"{path} cannot be read. {hint}. Save arrays of numbers with numpy.savez") from error
    if "train_images" not in arrays:
        raise ScriptError(f"{path} has no array 'train_images'. Its arrays are {', '.join(sorted(arrays)) or 'none'}")
    pictures: list[Picture] = []
    for split in ("train", "val", "test"):
        if f"{split}_images" in arrays:
            pictures += _pictures(f"{path}: {split}", split, arrays[f"{split}_images"], arrays.get(f"{split}_labels"))
    names = arrays.get("class_names")
    return numbered(str(path), pictures, None if names is None else [str(name) for name in names])


def has_idx_files(folder: Path) -> bool:
    """Returns True if the folder has IDX files with images."""
    return any(folder.glob("*-images-idx3-ubyte*"))


def read_idx(folder: Path) -> Source:
    """Reads the IDX files of a folder, with or without `.gz`. Raises ScriptError."""
    pictures: list[Picture] = []
    for split, prefixes in IDX_SPLITS.items():
        for prefix in prefixes:
            images = _idx_file(folder, f"{prefix}-images-idx3-ubyte")
            labels = _idx_file(folder, f"{prefix}-labels-idx1-ubyte")
            if images is None:
                continue
            if labels is None:
                raise ScriptError(f"{folder} has no file {prefix}-labels-idx1-ubyte, with the labels of the images")
            pictures += _pictures(f"{folder}: {prefix}", split, _idx(images), _idx(labels))
    return numbered(str(folder), pictures, None)


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.exists()), None)


def _idx(path: Path) -> np.ndarray:
    from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor

    try:
        with tempfile.NamedTemporaryFile() as plain:  # torchvision reads only uncompressed files
            plain.write(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
            plain.flush()
            return read_sn3_pascalvincent_tensor(plain.name, strict=False).numpy()
    except (OSError, ValueError, AssertionError, KeyError, EOFError, RuntimeError, zlib.error) as error:
        raise ScriptError(f"{path} is not an IDX file, or is damaged") from error


def _pictures(place: str, split: Split, images: np.ndarray, labels: Any) -> Iterator[Picture]:
    """Yields the pictures of arrays. Raises ScriptError if they are not pictures with one label each."""
    if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 3)):
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
