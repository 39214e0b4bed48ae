"""Reads Parquet files in the layout of the Hugging Face Hub: a column with picture files and a column with labels."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from scripts.common.data.source import Picture, Source, Split, numbered, renumbered, split_in
from scripts.common.errors import ScriptError
from scripts.common.progress import require

IMAGES, LABELS = ("image", "img", "picture"), ("label", "labels", "fine_label", "class")


def read_parquet(root: Path, files: list[Path]) -> Source:
    """Reads Parquet files of a folder, or `root` itself. Raises ScriptError."""
    pq = require("pyarrow.parquet", "parquet")
    splits = _splits_of(root, files)
    pictures: list[Picture] = []
    names: tuple[str, ...] | None = None
    texts: dict[str, int] = {}
    for path in files:
        path.open("rb").close()  # raises OSError if the file must not be read
        try:
            table = pq.read_table(path)
        except (OSError, ValueError) as error:  # pyarrow's exceptions are subclasses
            raise ScriptError(f"{path} is not a Parquet file, or is damaged. Download or write it again") from error
        image, label = (_column(path, table.column_names, known) for known in (IMAGES, LABELS))
        its_names = _names_of(table.schema, label)
        if path != files[0] and its_names != names:  # The numbers would have other meanings.
            raise ScriptError(
                f"{files[0]} and {path} do not have the same class names in the same order. Write both with the same"
            )
        names = its_names
        for number, (content, value) in enumerate(zip(table[image], table[label], strict=True)):
            place = f"{path}, row {number}"
            known = _label_of(place, _value_of(place, value), texts, may_be_text=bool(texts) or not pictures)
            pictures.append(Picture(place, splits[path], known, partial(_bytes_of, place, content)))
    if texts:
        names = tuple(sorted(texts))
        pictures = renumbered(pictures, [texts[name] for name in names])
    return numbered(str(root), pictures, names)


def _splits_of(root: Path, files: list[Path]) -> dict[Path, Split]:
    """Returns the split of each file. All files are for training if no name has a split.

    Raises ScriptError if only some names have a split, or if the files are those of several data sets.
    """
    found = {path: _split_of(root, path) for path in files}
    without = [path for path, (_, split) in found.items() if split is None]
    if without and len(without) < len(files):
        raise ScriptError(
            f"{without[0]}: the name has no split, unlike those of other files. Add train, val or test to it"
        )
    folders = sorted({folder for folder, _ in found.values()})
    if len(folders) > 1:
        raise ScriptError(
            f"{folders[0]} and {folders[1]} have Parquet files of different data. Choose one of the folders"
        )
    return {path: split or "train" for path, (_, split) in found.items()}


def _split_of(root: Path, path: Path) -> tuple[Path, Split | None]:
    """Returns the folder of all splits, and the split that the file or its folder has in its name."""
    if split := split_in(path.stem):
        return path.parent, split
    if path.parent != root and path != root and (split := split_in(path.parent.name)):
        return path.parent.parent, split
    return path.parent, None


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
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def _value_of(place: str, scalar: Any) -> Any:
    """Returns the Python value of a value of pyarrow. Raises ScriptError if there is none, as for damaged text."""
    try:
        return scalar.as_py()
    except (ValueError, OverflowError) as error:
        raise ScriptError(f"{place} cannot be read ({type(error).__name__}). Write the file again") from error


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
    value = _value_of(place, content)
    value = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(value, bytes):
        raise ScriptError(f"{place} has no picture file. Store the content of the file in the column, not its path")
    return value
