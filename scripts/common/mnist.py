"""Loads MNIST as tensors from IDX files. Downloads the files with torchvision if they do not exist."""

import gzip
import hashlib
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from model.spec import DIGITS
from scripts.common.data.data_set import DataSet, ImageSet, leave_out
from scripts.common.errors import ScriptError

NUM_VALIDATION = 5_000
NUM_CLASSES = 10
UNLEARNED_OF_EACH = 1_000  # training digits of each class that extractor and CLIP do not learn
TRAINING_DATA = f"MNIST, training split less the last {NUM_VALIDATION} images"  # describes the training data
DATA_OF_FEATURES = f"{TRAINING_DATA}, and less {UNLEARNED_OF_EACH} images of each digit"
# MD5 checksums of the original files after decompression.
CHECKSUMS = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
_HEADER_BYTES = {"images": 16, "labels": 8}  # magic number and sizes; not parsed, because the checksum covers them


def load_mnist(split: Literal["train", "test"], data_dir: Path) -> tuple[Tensor, Tensor]:
    """Returns images (N, 1, 28, 28) uint8 and labels (N,) int64. Downloads them if data_dir has no IDX files.

    Raises ScriptError if a file is missing, unreadable or differs from the original.
    """
    folder = _find_folder(data_dir) or _download(data_dir)
    prefix = "train" if split == "train" else "t10k"
    images = _read(folder, f"{prefix}-images-idx3-ubyte").reshape(-1, 1, 28, 28)
    labels = _read(folder, f"{prefix}-labels-idx1-ubyte")
    return torch.from_numpy(images), torch.from_numpy(labels).long()


def mnist_data(data_dir: Path) -> DataSet:
    """Returns the training split of MNIST as data for training. Raises the errors of `load_mnist`."""
    learn, validate = (ImageSet(*each) for each in split_validation(*load_mnist("train", data_dir)))
    return DataSet("MNIST", DIGITS, learn, validate, validate, known_as=TRAINING_DATA)


def split_validation(images: Tensor, labels: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Splits the training images into (training, validation). The last 5,000 images are for validation."""
    learn, validate = slice(None, -NUM_VALIDATION), slice(-NUM_VALIDATION, None)
    return (images[learn], labels[learn]), (images[validate], labels[validate])


def split_unlearned(images: Tensor, labels: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Splits the digits of `split_validation` into those that extractor and CLIP learn, and 10,000 others.

    The others are by all writers, 1,000 of each class. `leave_out` explains why they are needed.
    """
    learned, unlearned = leave_out(ImageSet(images, labels), UNLEARNED_OF_EACH)
    return (learned.images, learned.labels), (unlearned.images, unlearned.labels)


def _find_folder(data_dir: Path) -> Path | None:
    for folder in (data_dir, data_dir / "mnist"):
        if any(folder.glob("*-idx?-ubyte*")):
            return folder
    downloaded = data_dir / "MNIST" / "raw"
    # If a download was interrupted, some files are missing. torchvision then downloads them.
    whole = all((downloaded / name).exists() or (downloaded / f"{name}.gz").exists() for name in CHECKSUMS)
    return downloaded if whole else None


def _download(data_dir: Path) -> Path:
    try:
        from torchvision.datasets import MNIST

        MNIST(str(data_dir), download=True)
    except ImportError as error:
        raise ScriptError(
            f"no MNIST files in {data_dir}, and torchvision, which downloads them, is not installed. "
            "Install with: pip install -e '.[train]'"
        ) from error
    except (OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0].rstrip(":")
        raise ScriptError(
            f"no MNIST files in {data_dir}, and the download failed ({reason}). "
            "Check the network, or set --data-dir to the folder with the IDX files"
        ) from error
    return data_dir / "MNIST" / "raw"


def _read(folder: Path, name: str) -> np.ndarray:
    plain, packed = folder / name, folder / f"{name}.gz"
    path = plain if plain.exists() else packed
    try:
        content = path.read_bytes() if path is plain else gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ScriptError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != CHECKSUMS[name]:
        raise ScriptError(f"{path} is damaged: its MD5 checksum differs from the original file. Remove it")
    header = _HEADER_BYTES["images" if "images" in name else "labels"]
    return np.frombuffer(bytearray(content), dtype=np.uint8, offset=header)
