"""Reads a folder or a zip file that has one folder with pictures for each class, as torchvision's ImageFolder does.

The folders of the classes can be in folders `train`, `val` and `test`. Hidden files are ignored. A link that leaves the
folder is refused, because it could publish files that do not belong to the data. Nothing else is left out silently: a
folder without pictures, or a picture outside the folders of the classes, is an error.
"""

import os
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple, NoReturn

from scripts.common.data.source import SPLITS, Picture, Source, Split, check_names, printable
from scripts.common.errors import ScriptError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
FORMATS = "PNG, JPEG, WebP or GIF"
MAX_FILE_BYTES = 64 * 2**20
UTF8_FLAG = 0x800  # of a zip entry: its name is UTF-8
# Python decompresses a part of an entry with other methods without a limit, however large the part becomes.
ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
LAYOUT = "Put the pictures of each class into a folder with the name of the class"


class _File(NamedTuple):
    path: PurePosixPath  # from the top of the folder or the zip file
    size: int  # bytes
    read: Callable[[], bytes]


def read_folder(root: Path) -> Source:
    """Reads a folder. Raises ScriptError."""
    files, folders = list[_File](), list[PurePosixPath]()
    for folder, inner, names in walk(root):
        inside = PurePosixPath(folder.relative_to(root).as_posix())
        folders += [inside / name for name in inner]
        paths = [folder / name for name in names]
        files += [_File(inside / path.name, path.stat().st_size, path.read_bytes) for path in paths]
    return _source(str(root), files, folders)


def read_zip(path: Path) -> Source:
    """Reads a zip file. Its pictures are not extracted. Raises ScriptError."""
    try:
        archive = zipfile.ZipFile(path)
    # ValueError: a name in it is damaged. NotImplementedError: it has features that Python cannot read.
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ScriptError(f"{path} is not a zip file, or is damaged. Create it again") from error
    files, folders = list[_File](), list[PurePosixPath]()
    for entry in archive.infolist():
        name = _name_of(entry)
        inside = PurePosixPath(name)
        if ".." in inside.parts:
            raise ScriptError(f"{path}: {name} is outside the zip file. Create it in the folder of the pictures")
        if entry.compress_type not in ZIP_METHODS:
            raise ScriptError(f"{path}: {name} is not compressed by deflate, the usual method. Create the file again")
        if name.endswith("/"):
            folders.append(inside)
        else:
            files.append(_File(inside, entry.file_size, partial(_read_entry, archive, entry)))
    return _source(str(path), files, folders)


def _read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """Returns the content of an entry. Reads no more than its stated size, which can be too small in a zip bomb."""
    with archive.open(entry) as file:
        return file.read(entry.file_size)


def walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yields each folder and the names of its folders and files, without hidden ones, in alphabetical order.

    Raises ScriptError if a folder cannot be read, for a link to a folder or out of `root`, and for what is no file.
    """
    top = root.resolve()
    for place, folders, names in os.walk(root, onerror=_refuse_folder):
        folder = Path(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = sorted(name for name in names if not name.startswith("."))
        for name in folders:
            if (folder / name).is_symlink():
                raise ScriptError(f"{folder / name} is a link to a folder. Replace it with the folder itself")
        for name in names:
            _check_file(folder / name, root, top)
        yield folder, folders, names


def _check_file(path: Path, root: Path, top: Path) -> None:
    if not path.exists():  # a link can also lead to itself
        raise ScriptError(f"{path} is a link to a file that does not exist. Remove it")
    if path.is_symlink() and not path.resolve().is_relative_to(top):
        raise ScriptError(f"{path} is a link to a file outside {root}. Replace it with the file itself")
    if not path.is_file():  # reading from a pipe would wait without end
        raise ScriptError(f"{path} is not a file. Remove it")


def _refuse_folder(error: OSError) -> NoReturn:
    raise ScriptError(f"{error.filename} cannot be read ({error.strerror}). Make it readable or remove it") from error


def _name_of(entry: zipfile.ZipInfo) -> str:
    """Returns the path of an entry. Some programs write UTF-8 without the flag for it, or backslashes."""
    name = entry.filename
    if not entry.flag_bits & UTF8_FLAG:
        with suppress(UnicodeError):
            name = name.encode("cp437").decode()
    return name.replace("\\", "/")


def _is_visible(path: PurePosixPath) -> bool:
    return not any(part.startswith((".", "__MACOSX")) for part in path.parts)


def _source(place: str, files: list[_File], folders: list[PurePosixPath]) -> Source:
    visible = [file for file in files if _is_visible(file.path)]
    pictures = [file for file in visible if file.path.suffix.lower() in SUFFIXES]
    others = [file.path for file in visible if file.path.suffix.lower() not in SUFFIXES]
    if not pictures:
        some = f", only other files, such as {others[0]}" if others else ""
        raise ScriptError(f"{place} has no {FORMATS} files{some}. {LAYOUT}")
    paths = [file.path for file in pictures]
    skipped = _num_common_folders(place, paths)
    has_splits = _has_splits(place, [path.parts[skipped:] for path in paths])
    _check_folders(place, paths, others, [*filter(_is_visible, folders)], skipped + has_splits + 1)
    placed = [(*_split_and_class(place, path, skipped, has_splits=has_splits), path) for path in paths]
    if has_splits and not any(split == "train" for split, _, _ in placed):
        raise ScriptError(f"{place} has no folder 'train'. Rename the folder with the pictures for training")
    names = sorted({name for split, name, _ in placed if split == "train"})
    for split, name, path in placed:
        if name not in names:
            raise ScriptError(f"{place}: the class {name!r} of {path} ({split}) has no pictures for training. Add some")
    labels = {name: label for label, name in enumerate(check_names(names, place))}
    found = [
        Picture(f"{place}/{path}", split, labels[name], partial(_content, f"{place}/{path}", file))
        for file, (split, name, path) in zip(pictures, placed, strict=True)
    ]
    return Source(tuple(names), found, [printable(str(path)) for path in others])


def _num_common_folders(place: str, paths: list[PurePosixPath]) -> int:
    """Returns the number of folders that contain everything, as many zip files have one.

    A split is not counted, and neither is a folder whose pictures are all directly in it. Any other folder is, because
    it cannot be known whether it is a class. Raises ScriptError if a picture is outside the folders that follow.
    """
    number = 0
    while True:
        if loose := [path for path in paths if len(path.parts) == number + 1]:
            raise _not_in_a_class(place, loose[0])
        tops = {path.parts[number] for path in paths}
        is_split = paths[0].parts[number].lower() in SPLITS
        if len(tops) > 1 or is_split or all(len(path.parts) == number + 2 for path in paths):
            return number
        number += 1


def _has_splits(place: str, paths: list[tuple[str, ...]]) -> bool:
    """Returns True if the first folders are splits. Raises ScriptError if only some are.

    A single folder `train` with pictures directly in it can be a class, as a bus is.
    """
    splits = {parts[0] for parts in paths if parts[0].lower() in SPLITS}
    others = sorted({parts[0] for parts in paths} - splits)
    if not others:
        return True
    if len(splits) > 1 or any(parts[0] in splits and len(parts) > 2 for parts in paths):
        raise ScriptError(
            f"{place}: the folder {others[0]} is next to the folder {min(splits)}, but is not named train, val or "
            "test. Rename or remove it"
        )
    return False


def _check_folders(
    place: str, pictures: list[PurePosixPath], others: list[PurePosixPath], folders: list[PurePosixPath], levels: int
) -> None:
    """Raises ScriptError if a folder of a class or a split has no pictures."""
    known = {path.parts[:level] for path in pictures for level in range(1, levels + 1)}
    without = [
        PurePosixPath(*path.parts[:level])
        for path in [*(path.parent for path in others), *folders]
        for level in range(1, min(levels, len(path.parts)) + 1)
        if path.parts[:level] not in known
    ]
    if without:
        folder = without[0]
        example = next((path.name for path in others if path.is_relative_to(folder)), None)
        some = f", only other files, such as {example}. Convert its pictures to one of these formats, or remove it"
        none = ". Add pictures, or remove it"
        raise ScriptError(f"{place}: the folder {folder} has no {FORMATS} files{some if example else none}")


def _split_and_class(place: str, path: PurePosixPath, skipped: int, *, has_splits: bool) -> tuple[Split, str]:
    top, *others = path.parts[skipped:-1]
    if not has_splits:
        return "train", _class_of(top)
    if not others:
        raise _not_in_a_class(place, path)
    return SPLITS[top.lower()], _class_of(others[0])


def _class_of(folder: str) -> str:
    """Returns the name of the class of a folder. An accent can be encoded in two ways, which look the same."""
    return unicodedata.normalize("NFC", folder)


def _not_in_a_class(place: str, path: PurePosixPath) -> ScriptError:
    return ScriptError(f"{place}: the picture {path} is not in the folder of a class. {LAYOUT}")


def _content(place: str, file: _File) -> bytes:
    if file.size > MAX_FILE_BYTES:
        raise ScriptError(f"{place} is {file.size / 2**20:.0f} MiB large. The limit is {MAX_FILE_BYTES // 2**20} MiB")
    try:
        return file.read()
    # RuntimeError: the entry of a zip file is encrypted. ValueError: its second copy of the name is damaged.
    except (zipfile.BadZipFile, zlib.error, RuntimeError, ValueError, OSError, EOFError) as error:
        raise ScriptError(f"{place} cannot be read ({error}). Repair or remove this file") from error
