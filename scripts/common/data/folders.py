"""Reads a folder or a zip file that has one folder with pictures for each class, as torchvision's ImageFolder does.

The folders of the classes can be in folders `train`, `val` and `test`. Hidden files are ignored. A link that leaves the
folder is refused, because it could publish files that do not belong to the data.
"""

import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from scripts.common.data.source import SPLITS, Picture, Source, Split, check_names
from scripts.common.errors import ScriptError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
MAX_FILE_BYTES = 64 * 2**20
LAYOUT = "Put the pictures of each class into a folder with the name of the class"


class _File(NamedTuple):
    path: PurePosixPath  # from the top of the folder or the zip file
    size: int  # bytes
    read: Callable[[], bytes]


def read_folder(root: Path) -> Source:
    """Reads a folder. Raises ScriptError."""
    return _source(str(root), list(_files_of(root)))


def read_zip(path: Path) -> Source:
    """Reads a zip file. Its pictures are not extracted. Raises ScriptError."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise ScriptError(f"{path} is not a zip file, or is damaged") from error
    files = [
        _File(PurePosixPath(entry.filename), entry.file_size, partial(_read_entry, archive, entry, path))
        for entry in archive.infolist()
        if not entry.is_dir()
    ]
    return _source(str(path), files)


def _read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> bytes:
    try:
        return archive.read(entry)
    # RuntimeError: the entry is encrypted. NotImplementedError: its compression is not supported.
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, EOFError) as error:
        raise ScriptError(f"{path}/{entry.filename} cannot be read ({error}). Make the zip file again") from error


def _files_of(root: Path) -> Iterator[_File]:
    top = root.resolve()
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if (Path(folder) / name).is_symlink():
                raise ScriptError(f"{Path(folder) / name} is a link to a folder. Replace it with the folder itself")
        for name in sorted(names):
            path = Path(folder) / name
            if path.is_symlink() and not path.resolve().is_relative_to(top):
                raise ScriptError(f"{path} is a link to a file outside {root}. Replace it with the file itself")
            with suppress(FileNotFoundError):  # a link to a file that does not exist
                yield _File(PurePosixPath(path.relative_to(root).as_posix()), path.stat().st_size, path.read_bytes)


def _source(place: str, files: list[_File]) -> Source:
    visible = [file for file in files if not any(part.startswith((".", "__MACOSX")) for part in file.path.parts)]
    pictures = [file for file in visible if file.path.suffix.lower() in SUFFIXES]
    ignored = [str(file.path) for file in visible if file.path.suffix.lower() not in SUFFIXES]
    if not pictures:
        some = f", only other files, such as {ignored[0]}" if ignored else ""
        raise ScriptError(f"{place} has no PNG, JPEG, WebP or GIF files{some}. {LAYOUT}")
    pictures = _without_common_folder(pictures)
    if loose := [file for file in pictures if len(file.path.parts) == 1]:
        raise ScriptError(f"{place}: the picture {loose[0].path} is not in the folder of a class. {LAYOUT}")
    has_splits = all(file.path.parts[0].lower() in SPLITS for file in pictures)
    placed = [_placed(file, place, has_splits=has_splits) for file in pictures]
    if has_splits and not any(split == "train" for split, _, _ in placed):
        raise ScriptError(f"{place} has no folder 'train'. Rename the folder with the pictures for training")
    names = sorted({name for split, name, _ in placed if split == "train"})
    for split, name, file in placed:
        if name not in names:
            raise ScriptError(f"{place}: the class {name!a} of {file.path} ({split}) has no pictures for training")
    labels = {name: label for label, name in enumerate(check_names(names, place))}
    return Source(tuple(names), [_picture(place, split, labels[name], file) for split, name, file in placed], ignored)


def _without_common_folder(files: list[_File]) -> list[_File]:
    """Removes a folder that contains everything, as many zip files have one, unless it is a class or a split."""
    while len({file.path.parts[0] for file in files}) == 1 and all(len(file.path.parts) > 2 for file in files):
        if files[0].path.parts[0].lower() in SPLITS:
            break
        files = [file._replace(path=PurePosixPath(*file.path.parts[1:])) for file in files]
    return files


def _placed(file: _File, place: str, *, has_splits: bool) -> tuple[Split, str, _File]:
    """Returns the split and the class of a file."""
    parts = file.path.parts
    if not has_splits:
        return "train", parts[0], file
    if len(parts) == 2:
        raise ScriptError(f"{place}: the picture {file.path} is not in the folder of a class. {LAYOUT}")
    return SPLITS[parts[0].lower()], parts[1], file


def _picture(place: str, split: Split, label: int, file: _File) -> Picture:
    name = f"{place}/{file.path}"
    if file.size > MAX_FILE_BYTES:
        raise ScriptError(f"{name} is {file.size / 2**20:.0f} MiB large. The limit is {MAX_FILE_BYTES // 2**20} MiB")
    return Picture(name, split, label, file.read)
