"""Reads Parquet files in the layout of the Hugging Face Hub: a column with picture files and a column with labels."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from scripts.common.data.source import SPLITS, Picture, Source, Split, numbered
from scripts.common.errors import ScriptError
from scripts.common.progress import require

IMAGES, LABELS = ("image", "img", "picture"), ("label", "labels", "fine_label", "class")


def parquet_files(path: Path) -> list[Path]:
    """Returns the Parquet files of a path: the file itself, or those in a folder and in its folder `data`."""
    if path.is_file():
        return [path] if path.suffix == ".parquet" else []
    return sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")])


def read_parquet(files: list[Path]) -> Source:
    """Reads Parquet files. The part of a file name before the first `-` is its split. Raises ScriptError."""
    pq = require("pyarrow.parquet", "parquet")
    pictures: list[Picture] = []
    names: tuple[str, ...] | None = None
    texts: dict[str, int] = {}
    for path in files:
        try:
            table = pq.read_table(path)
        except (OSError, ValueError) as error:  # pyarrow's exceptions are subclasses
            raise ScriptError(f"{path} is not a Parquet file, or is damaged") from error
        image, label = (_column(path, table.column_names, known) for known in (IMAGES, LABELS))
        names = names or _names_of(table.schema, label)
        split = _split_of(path)
        for number, (content, value) in enumerate(zip(table[image], table[label], strict=True)):
            place = f"{path}, row {number}"
            known = _label_of(place, value.as_py(), texts, may_be_text=bool(texts) or not pictures)
            pictures.append(Picture(place, split, known, partial(_bytes_of, place, content)))
    if texts:
        order = sorted(texts)
        renumbered = {texts[name]: number for number, name in enumerate(order)}
        pictures = [Picture(each.place, each.split, renumbered[each.label], each.read) for each in pictures]
        names = tuple(order)
    return numbered(str(files[0]), pictures, names)


def _column(path: Path, columns: list[str], known: tuple[str, ...]) -> str:
    found = [name for name in known if name in columns]
    if not found:
        raise ScriptError(f"{path} has no column {known[0]!r}. Its columns are {', '.join(columns)}")
    return found[0]


def _names_of(schema: Any, label: str) -> tuple[str, ...] | None:
    """Returns the names of the classes that the package `datasets` stores in the schema, or None."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(map(str, features[label]["names"]))
    except (KeyError, TypeError, ValueError):
        return None


def _split_of(path: Path) -> Split:
    return SPLITS.get(path.stem.partition("-")[0].lower(), "train")


def _label_of(place: str, value: Any, texts: dict[str, int], *, may_be_text: bool) -> int:
    """Returns the number of a label. Texts are numbered in the order in which they occur."""
    if isinstance(value, str) and may_be_text:
        return texts.setdefault(value, len(texts))
    if isinstance(value, bool) or not isinstance(value, int) or value < 0 or texts:
        raise ScriptError(
            f"{place}: the label {value!r:.60} cannot be used. Use only texts, or only whole numbers from 0"
        )
    return value


def _bytes_of(place: str, content: Any) -> bytes:
    value = content.as_py()
    value = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(value, bytes):
        raise ScriptError(f"{place} has no picture file. Store the content of the file in the column, not its path")
    return value
