"""What every reader of pictures returns: the names of the classes, and the pictures before they are decoded."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
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
        except PictureError as error:  # The rest of the message tells a client of the service what to send.
            reason = str(error).partition(". ")[0]
            raise ScriptError(f"{self.place}: {reason}. Remove or replace this picture") from error


@dataclass(frozen=True, slots=True)
class Source:
    """All pictures of a source. A label is the place of the class in `class_names`."""

    class_names: tuple[str, ...]
    pictures: Sequence[Picture]
    ignored: Sequence[str] = ()  # files that are not PNG, JPEG, WebP or GIF


def numbered(place: str, pictures: Sequence[Picture], names: Sequence[str] | None) -> Source:
    """Returns the pictures of a source whose labels are numbers. Without names, the numbers are the names."""
    num_classes = 1 + max((picture.label for picture in pictures), default=-1)
    names = [str(label) for label in range(num_classes)] if names is None else names
    if len(names) < num_classes:
        raise ScriptError(f"{place} has {len(names)} class names, but the largest label is {num_classes - 1}")
    return Source(check_names(names, place), pictures)


def check_names(names: Collection[str], place: str) -> tuple[str, ...]:
    """Returns the names of the classes. Raises ScriptError if there are too many, or if a name cannot be used."""
    if len(names) > MAX_CLASSES:
        raise ScriptError(f"{place} has {len(names)} classes. At most {MAX_CLASSES} are supported. Merge some of them")
    for name in names:
        if not name.strip() or not name.isprintable() or len(name) > MAX_NAME_LENGTH:
            raise ScriptError(
                f"{place}: the class {name[: MAX_NAME_LENGTH + 1]!a} needs a name of 1 to {MAX_NAME_LENGTH} printable "
                "characters. Rename it"
            )
    known: dict[str, str] = {}
    for name in names:
        if (other := known.setdefault(name.casefold(), name)) != name:
            raise ScriptError(f"{place}: the classes {other!a} and {name!a} differ only in case. Rename one of them")
    return tuple(names)
