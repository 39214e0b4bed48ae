"""What every reader of pictures returns: the names of the classes, and the pictures before they are decoded."""

import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from app.engine.job import Pixels
from app.tasks.picture_files import PictureError, inspect
from app.tasks.pictures import decode_colour
from model.checkpoint import MAX_SIZES
from model.spec import MAX_NAME_LENGTH
from scripts.common.errors import ScriptError

Split = Literal["train", "val", "test"]
SPLITS: dict[str, Split] = {  # names of folders and of parts of file names
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "t10k"), "test"),
}
TURNED = 5  # EXIF orientations from this value on exchange height and width
MAX_CLASSES = MAX_SIZES["num_classes"]


@dataclass(frozen=True, slots=True)
class Picture:
    """A labelled picture. `read` returns a picture file, or its pixels (H, W) or (H, W, 3) in uint8."""

    place: str  # names it in errors
    split: Split
    label: int
    read: Callable[[], bytes | Pixels]

    def decode(self) -> Pixels:
        """Returns the pixels (H, W, 3). Raises ScriptError for a file that is damaged or not a permitted picture."""
        content = self.read()
        if not isinstance(content, bytes):
            return np.repeat(content[..., None], 3, axis=2) if content.ndim == 2 else content
        with self._errors():
            return decode_colour(content)

    def size(self) -> tuple[int, int]:
        """Returns the height and the width without decoding a picture file. Raises ScriptError as `decode` does."""
        content = self.read()
        if not isinstance(content, bytes):
            return content.shape[0], content.shape[1]
        with self._errors():
            file = inspect(content)
        return (file.width, file.height) if file.orientation >= TURNED else (file.height, file.width)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except PictureError as error:
            reason, _, action = str(error).rpartition(". ")
            if "send" in action.lower():  # tells a client of the service what to send
                action = "Remove or replace this picture"
            raise ScriptError(f"{self.place}: {reason}. {action}") from error


@dataclass(frozen=True, slots=True)
class Source:
    """All pictures of a source. A label is the place of the class in `class_names`."""

    class_names: tuple[str, ...]
    pictures: Sequence[Picture]
    ignored: Sequence[str] = ()  # files that are not PNG, JPEG, WebP or GIF


def printable(text: str) -> str:
    """Escapes line breaks, control characters, and the bytes of file names that are not valid UTF-8."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def split_in(name: str) -> Split | None:
    """Returns the split that the name of a file or folder has between `-`, `_` or `.`, or None.

    Raises ScriptError if the name has several.
    """
    found = {SPLITS[part] for part in re.split(r"[-_.]", name.lower()) if part in SPLITS}
    if len(found) > 1:
        raise ScriptError(f"The name {name!r} has the names of several splits. Rename it so that it has only one")
    return next(iter(found), None)


def numbered(place: str, pictures: Sequence[Picture], names: Sequence[str] | None) -> Source:
    """Returns the pictures of a source whose labels are numbers.

    Without names, the numbers that occur are the names: many data sets count from 1. Raises ScriptError.
    """
    largest = max((picture.label for picture in pictures), default=-1)
    if names is None:
        if largest >= MAX_CLASSES:
            raise ScriptError(f"{place}: the largest label is {largest}. It must be at most {MAX_CLASSES - 1}")
        labels = sorted({picture.label for picture in pictures})
        pictures, names = renumbered(pictures, labels), [str(label) for label in labels]
    elif len(names) <= largest:
        raise ScriptError(f"{place} has {len(names)} class names, but the largest label is {largest}. Name all classes")
    return Source(check_names(names, place), pictures)


def renumbered(pictures: Sequence[Picture], labels: Sequence[int]) -> list[Picture]:
    """Returns the pictures with the place in `labels` as their label."""
    places = {label: place for place, label in enumerate(labels)}
    return [replace(picture, label=places[picture.label]) for picture in pictures]


def check_names(names: Collection[str], place: str) -> tuple[str, ...]:
    """Returns the names of the classes. Raises ScriptError if there are too many, or if a name cannot be used."""
    if len(names) > MAX_CLASSES:
        raise ScriptError(f"{place} has {len(names)} classes. At most {MAX_CLASSES} are supported. Merge some of them")
    for name in names:
        if not name.strip() or not name.isprintable() or len(name) > MAX_NAME_LENGTH:
            raise ScriptError(
                f"{place}: the class {name[: MAX_NAME_LENGTH + 1]!r} needs a name of 1 to {MAX_NAME_LENGTH} printable "
                "characters. Rename it"
            )
    known: dict[str, str] = {}
    for name in names:
        key = unicodedata.normalize("NFC", name).casefold().strip()
        if (other := known.get(key)) is not None:
            how = "differ only in case" if other.casefold() == name.casefold() else "look the same"
            raise ScriptError(
                f"{place}: the classes {other!r} and {name!r} {'have the same name' if other == name else how}. "
                "Rename one of them"
            )
        known[key] = name
    return tuple(names)
