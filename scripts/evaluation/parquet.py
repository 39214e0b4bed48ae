"""Parquet files of labelled images in the layout of the Hugging Face Hub, written and read with pyarrow.

`datasets.load_dataset` shows the columns `image` and `label` as the features Image and ClassLabel, because the schema
has the features under the key `huggingface`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from model.files import write_atomically
from model.png import encode_pixels
from scripts.common.errors import ScriptError
from scripts.common.mnist import NUM_CLASSES
from scripts.common.progress import require
from scripts.evaluation.dataset_files import Rows

EXTRA = "parquet"
SPLIT_FILES = "data/train-*"  # pattern of the files of the split `train`
FILE = "data/train-00000-of-00001.parquet"  # 60,000 images take about 28 MB; the Hub splits at 500 MB
ROW_GROUP = 1000  # rows, about 0.5 MB: little to read for a page of the Hub's viewer, and few groups to list
CLASS_NAMES = [str(digit) for digit in range(NUM_CLASSES)]


def features_of(*, has_confidence: bool) -> dict[str, dict[str, Any]]:
    """Returns the features of the columns, in the form of the package `datasets`."""
    confidence = {"confidence": {"dtype": "float32", "_type": "Value"}} if has_confidence else {}
    return {
        "image": {"_type": "Image"},
        "label": {"names": CLASS_NAMES, "_type": "ClassLabel"},
        "seed": {"dtype": "int64", "_type": "Value"},
        "index": {"dtype": "int64", "_type": "Value"},
        **confidence,
    }


def write_parquet(folder: Path, rows: Rows, *, seed: int) -> None:
    """Writes the images, their labels, and the seed and index of their noise to FILE in the folder.

    The same rows give the same bytes with the same release of pyarrow.
    """
    pa, pq = require("pyarrow", EXTRA), require("pyarrow.parquet", EXTRA)
    has_confidence = rows.confidence is not None
    types = {
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "label": pa.int64(),
        "seed": pa.int64(),
        "index": pa.int64(),
        **({"confidence": pa.float32()} if has_confidence else {}),
    }
    info = {"info": {"features": features_of(has_confidence=has_confidence)}}
    schema = pa.schema(types, metadata={"huggingface": json.dumps(info)})
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema, use_dictionary=["label", "seed"], write_page_index=True) as writer:
        for columns in _groups(rows, seed):
            arrays = [pa.array(columns[name], type=kind) for name, kind in types.items()]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema), row_group_size=ROW_GROUP)
    write_atomically(folder / FILE, sink.getvalue().to_pybytes())


def _groups(rows: Rows, seed: int) -> Iterator[dict[str, Any]]:
    """Yields the columns of each row group."""
    for start in range(0, len(rows.labels), ROW_GROUP):
        group = slice(start, start + ROW_GROUP)
        labels, index = rows.labels[group], rows.noise_index[group]
        columns = {
            "image": [
                {"bytes": encode_pixels(image), "path": f"digit-{label}-seed-{seed}-{i}.png"}
                for image, label, i in zip(rows.images[group], labels.tolist(), index.tolist(), strict=True)
            ],
            "label": labels,
            "seed": np.full(len(labels), seed),
            "index": index,
        }
        yield columns if rows.confidence is None else {**columns, "confidence": rows.confidence[group]}


def find_parquet(folder: Path) -> list[Path]:
    """Returns the Parquet files of the split `train` of a data set."""
    return sorted(folder.glob(f"{SPLIT_FILES}.parquet"))


def read_parquet(paths: list[Path]) -> tuple[list[tuple[str, bytes]], np.ndarray]:
    """Returns a name and the encoded bytes of each image, and the labels, int64 (N,). Raises ScriptError."""
    pa, pc = require("pyarrow", EXTRA), require("pyarrow.compute", EXTRA)
    pq = require("pyarrow.parquet", EXTRA)
    images: list[tuple[str, bytes]] = []
    labels: list[int] = []
    for path in paths:
        try:
            table = pq.read_table(path, columns=["image", "label"])
            encoded = pc.struct_field(table["image"], "bytes").to_pylist()
            labels += [int(label) for label in table["label"].to_pylist()]
            images += [(f"{path}, row {row}", bytes(content)) for row, content in enumerate(encoded)]
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            message = f"{path} is not a Parquet file with a column of images and a column of labels from 0 to 9"
            raise ScriptError(message) from error
    if not labels or not 0 <= min(labels) <= max(labels) < NUM_CLASSES:
        raise ScriptError(f"{paths[0].parent} must have images with labels from 0 to 9")
    return images, np.array(labels)
