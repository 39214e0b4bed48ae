"""Writes small data of three classes in every layout, with the same pictures in each of them."""

import gzip
import io
import json
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts.common.data.data_set import DataSet, load_data
from scripts.common.errors import ScriptError
from scripts.common.progress import Reporter

NAMES = ("cat", "dog", "owl")
COUNTS = {"train": 8, "test": 3}  # pictures of each class
SIZE = 12


def load(path: Path, image_size: int | None = None) -> DataSet:
    with Reporter() as reporter:
        return load_data(path, reporter, image_size)


def message(path: Path, image_size: int | None = None) -> str:
    """Returns the error of data that cannot be loaded. It is one line."""
    with pytest.raises(ScriptError) as raised:
        load(path, image_size)
    text = str(raised.value)
    assert len(text.splitlines()) == 1
    return text


def pixels_of(label: int, number: int, split: str = "train", *, grey: bool = False) -> np.ndarray:
    """Returns a picture (SIZE, SIZE, 3), or (SIZE, SIZE) if it is grey. All pictures differ."""
    seed = 1000 * label + 10 * number + (split == "test")
    shape = (SIZE, SIZE) if grey else (SIZE, SIZE, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(pixels: np.ndarray, name: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, name)
    return buffer.getvalue()


def pictures(split: str, *, grey: bool = False) -> Iterator[tuple[int, int, np.ndarray]]:
    for label in range(len(NAMES)):
        for number in range(COUNTS[split]):
            yield label, number, pixels_of(label, number, split, grey=grey)


def write_folder(root: Path, *, splits: bool = False, grey: bool = False) -> Path:
    for split in ("train", "test") if splits else ("train",):
        for label, number, pixels in pictures(split, grey=grey):
            folder = root / split / NAMES[label] if splits else root / NAMES[label]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.png").write_bytes(encoded(pixels))
    return root


def write_zip(path: Path, *, top: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for split in ("train", "test"):
            for label, number, pixels in pictures(split):
                archive.writestr(f"{top}{split}/{NAMES[label]}/{number}.png", encoded(pixels))
    return path


def write_npz(path: Path, *, names: bool = True) -> Path:
    arrays: dict[str, np.ndarray] = {"class_names": np.array(NAMES)} if names else {}
    for split in ("train", "test"):
        labels, _, images = zip(*pictures(split), strict=True)
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = np.stack(images), np.array(labels)[:, None]
    np.savez(path, **arrays)
    return path


def write_idx(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        labels, _, images = zip(*pictures(split, grey=True), strict=True)
        head = struct.pack(">4i", 2051, len(images), SIZE, SIZE)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + np.stack(images).tobytes()))
        content = struct.pack(">2i", 2049, len(labels)) + bytes(labels)
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(content)
    return folder


def write_parquet(folder: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    features = {"image": {"_type": "Image"}, "label": {"names": list(NAMES), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    for split in ("train", "test"):
        labels, _, images = zip(*pictures(split), strict=True)
        rows = [{"bytes": encoded(image), "path": f"{i}.png"} for i, image in enumerate(images)]
        table = pa.table({"image": rows, "label": list(labels)}).replace_schema_metadata(metadata)
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return folder
