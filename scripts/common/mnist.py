"""MNIST as tensors: read from IDX files, or downloaded by torchvision where there are none."""

import gzip
import hashlib
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from scripts.common.errors import ScriptError

NUM_VALIDATION = 5_000
NUM_CLASSES = 10
# MD5 of the unpacked files, the originals'.
CHECKSUMS = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
_HEADER_BYTES = {"images": 16, "labels": 8}  # magic number and sizes, which the checksum covers


def load_mnist(split: Literal["train", "test"], data_dir: Path) -> tuple[Tensor, Tensor]:
    """Returns images (N, 1, 28, 28) uint8 and labels (N,) int64. Downloads them if data_dir has no IDX files.

    Raises ScriptError if a file is missing, unreadable or not the original.
    """
    folder = _find_folder(data_dir) or _download(data_dir)
    prefix = "train" if split == "train" else "t10k"
    images = _read(folder, f"{prefix}-images-idx3-ubyte").reshape(-1, 1, 28, 28)
    labels = _read(folder, f"{prefix}-labels-idx1-ubyte")
    return torch.from_numpy(images), torch.from_numpy(labels).long()


def split_validation(images: Tensor, labels: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The training split into what is learned from and what validates: the last 5,000, whatever the seed."""
    learn, validate = slice(None, -NUM_VALIDATION), slice(-NUM_VALIDATION, None)
    return (images[learn], labels[learn]), (images[validate], labels[validate])


def _find_folder(data_dir: Path) -> Path | None:
    for folder in (data_dir, data_dir / "mnist"):
        if any(folder.glob("*-idx?-ubyte*")):
            return folder
    downloaded = data_dir / "MNIST" / "raw"
    # Of a download that broke off some files are there: torchvision brings the others.
    whole = all((downloaded / name).exists() or (downloaded / f"{name}.gz").exists() for name in CHECKSUMS)
    return downloaded if whole else None


def _download(data_dir: Path) -> Path:
    try:
        from torchvision.datasets import MNIST

        MNIST(str(data_dir), download=True)
    except ImportError as error:
        raise ScriptError(
            f"no MNIST files in {data_dir}, and torchvision, which downloads them, is not installed: "
            "pip install -e '.[train]' brings it"
        ) from error
    except (OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0].rstrip(":")
        raise ScriptError(
            f"no MNIST files in {data_dir}, and the download failed ({reason}): "
            "it needs a network, or --data-dir the folder with the IDX files"
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
        raise ScriptError(f"{path} is damaged: its checksum is not that of MNIST's {name}")
    header = _HEADER_BYTES["images" if "images" in name else "labels"]
    return np.frombuffer(bytearray(content), dtype=np.uint8, offset=header)
