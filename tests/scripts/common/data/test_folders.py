import os
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.common.data.first_look import lines_about
from tests.scripts.common.data.samples import NAMES, encoded, load, message, pixels_of, write_folder, write_zip

OTHERS = "has no PNG, JPEG, WebP or GIF files, only other files, such as"


def write(root: Path, *names: str) -> Path:
    """Writes a picture for each name. All pictures differ."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(pixels_of(0, number)) if path.suffix == ".png" else b"x")
    return root


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ("photos/cats/1.png", "photos/dogs/1.png", "photos/logo.png"),
            "the picture photos/logo.png is not in the folder of a class. Put the pictures of each class into a folder",
        ),
        (("cats/2020/1.png", "cats/2.png"), "the picture cats/2.png is not in the folder of a class"),
        (("x/train/cats/1.png", "x/test/cats/1.png", "x/cover.png"), "the picture x/cover.png is not in the folder"),
        (("train/cats/1.png", "test/cats/1.png", "cover.png"), "the picture cover.png is not in the folder"),
        (("train/cats/1.png", "train/2.png"), "the picture train/2.png is not in the folder of a class"),
        (
            ("x/train/cats/1.png", "x/test/cats/1.png", "x/unlabelled/1.png"),
            "the folder unlabelled is next to the folder test, but is not named train, val or test. Rename or",
        ),
        (("train/cats/1.png", "check/cats/1.png"), "the folder check is next to the folder train, but is not named"),
        (("train/1.png", "test/2.png", "extra/3.png"), "the folder extra is next to the folder test, but is not named"),
        (("cats/1.png", "cats/2.png", "dogs/1.heic"), f"the folder dogs {OTHERS} 1.heic. Convert its pictures"),
        (("x/cats/1/1.png", "x/dogs/1/1.bmp"), f"the folder x/dogs {OTHERS} 1.bmp. Convert its pictures"),
        (("train/cats/1.png", "train/dogs/1.bmp"), f"the folder train/dogs {OTHERS} 1.bmp. Convert its pictures"),
        (("train/cats/1.png", "test/cats/1.bmp"), f"the folder test {OTHERS} 1.bmp. Convert its pictures"),
    ],
)
def test_folder_or_picture_outside_the_layout_is_refused(tmp_path: Path, names: tuple[str, ...], expected: str) -> None:
    text = message(write(tmp_path / "data", *names))
    assert expected in text, text


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("cats/1.png", "cats/2.png"), ("cats",)),
        (("cats/1.png", "cats/old/2.png", "dogs/new/3.png", "dogs/4.png"), ("cats", "dogs")),
        (("train/1.png", "train/2.png", "bus/3.png", "bus/4.png"), ("bus", "train")),
        (("x/train/cats/1.png", "x/dev/cats/2.png"), ("cats",)),
        (("cats/2020/1.png", "cats/2020/2.png", "cats/2021/3.png", "cats/2021/4.png"), ("2020", "2021")),
        (("cats/1.png", "cats/2.png", "cats/notes/x.txt", "x.txt"), ("cats",)),
    ],
)
def test_folders_of_classes_are_found(tmp_path: Path, names: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert load(write(tmp_path / "data", *names)).class_names == expected


def test_error_in_a_common_folder_names_the_whole_path(tmp_path: Path) -> None:
    root = write(tmp_path / "data", "x/cats/1.png", "x/cats/2.png")
    (root / "x/cats/3.png").write_bytes(b"")
    assert "data/x/cats/3.png: The file is empty" in message(root)


def test_folder_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, scandir = write_folder(tmp_path / "data"), os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert message(root).endswith("data/dog cannot be read (Permission denied). Make it readable or remove it")


@pytest.mark.parametrize("target", ["missing.png", "link.png"])
def test_link_to_a_file_that_does_not_exist_is_refused(tmp_path: Path, target: str) -> None:
    root = write_folder(tmp_path / "data")
    (root / "cat" / "link.png").symlink_to(target)
    assert message(root).endswith("data/cat/link.png is a link to a file that does not exist. Remove it")


def test_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, read = write_folder(tmp_path / "data"), Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "0.png":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    text = message(root)
    assert "data/cat/0.png cannot be read ([Errno 13] Permission denied). Repair or remove this file." in text
    assert text.endswith("2 other pictures cannot be used either")


def test_names_that_are_not_utf8_are_printable(tmp_path: Path) -> None:
    root = write_folder(tmp_path / os.fsdecode(b"d\xe4ta"))
    (root / "cat" / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"x")
    data = load(root)
    assert list(data.ignored) == ["cat/caf\\udce9.txt"]
    assert any("ignored files of other types: 1, such as cat/caf" in line for line in lines_about(data))
    data.description.encode()
    (root / "cat" / os.fsdecode(b"\xe9\n.png")).write_bytes(b"")
    assert "cat/\\udce9\\n.png: The file is empty" in message(root)


def test_names_of_classes_are_printed_as_they_are_written(tmp_path: Path) -> None:
    root = write(tmp_path / "data", "Äpfel/1.png", "Äpfel/2.png")
    assert any("warning: the class 'Äpfel' has only 1 image." in line for line in lines_about(load(root)))
    (root / "Äpfel/1.png").unlink()
    assert "the class 'Äpfel' has only one image" in message(root)


def unflagged(path: Path) -> None:
    """Removes the flag for UTF-8 from all entries: bit 11 of the flags, local and central."""
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\3\4", 7), (b"PK\1\2", 9)):
        at = content.find(signature)
        while at >= 0:
            content[at + offset] &= ~0x08
            at = content.find(signature, at + 4)
    path.write_bytes(content)


def without_flag(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(2):
            archive.writestr(f"Äpfel/{number}.png", encoded(pixels_of(0, number)))
    unflagged(path)


def with_cp437(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(2):
            archive.writestr(f"?pfel/{number}.png", encoded(pixels_of(0, number)))
    path.write_bytes(path.read_bytes().replace(b"?pfel", b"\x8epfel"))


def with_backslashes(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("Äpfel\\", b"")
        for number in range(2):
            archive.writestr(f"Äpfel\\{number}.png", encoded(pixels_of(0, number)))


@pytest.mark.parametrize("write_entries", [without_flag, with_cp437, with_backslashes])
def test_names_of_zip_files_of_other_programs_are_read(tmp_path: Path, write_entries: Callable[[Path], None]) -> None:
    write_entries(tmp_path / "data.zip")
    data = load(tmp_path / "data.zip")
    assert data.class_names == ("Äpfel",)
    assert not data.ignored


def test_entry_with_damaged_compression_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cat/0.png", bytes(1000))
    content = bytearray(path.read_bytes())
    start = 30 + len("cat/0.png")
    content[start] = 0xFF  # a block of a reserved type
    path.write_bytes(content)
    with pytest.raises(zlib.error), zipfile.ZipFile(path) as archive:
        archive.read("cat/0.png")
    assert "data.zip/cat/0.png cannot be read (Error -3 " in message(path)


def test_error_in_a_zip_file_names_the_whole_path(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "data.zip", top="animals/")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"animals/train/{NAMES[0]}/bad.png", b"")
    assert "data.zip/animals/train/cat/bad.png: The file is empty" in message(path)


@pytest.mark.parametrize(
    ("names", "empty", "expected"),
    [
        (("cats/1.png", "cats/2.png"), "dogs", "the folder dogs"),
        (("cats/1.png", "cats/2.png", "dogs/.DS_Store"), "", "the folder dogs"),
        (("train/cats/1.png", "train/cats/2.png"), "train/dogs", "the folder train/dogs"),
        (("train/cats/1.png", "train/cats/2.png"), "test/cats", "the folder test"),
        (("x/cats/1.png", "x/dogs/2.png"), "x/owls/old", "the folder x/owls"),
    ],
)
def test_folder_of_a_class_or_a_split_without_pictures_is_refused(
    tmp_path: Path, names: tuple[str, ...], empty: str, expected: str
) -> None:
    root = write(tmp_path / "data", *names)
    (root / empty).mkdir(parents=True, exist_ok=True)
    wanted = f"data: {expected} has no PNG, JPEG, WebP or GIF files. Add pictures, or remove it"
    assert message(root).endswith(wanted)
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for path in sorted(root.rglob("*")):
            archive.write(path, path.relative_to(root))
    assert message(tmp_path / "data.zip").endswith(wanted.replace("data:", "data.zip:"))


def test_empty_folder_within_a_class_is_ignored(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data")
    (root / "cat" / "old").mkdir()
    assert load(root).class_names == NAMES


def test_pipe_is_refused_without_reading_it(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data")
    os.mkfifo(root / "cat" / "9.png")
    assert message(root).endswith("data/cat/9.png is not a file. Remove it")
    os.mkfifo(tmp_path / "data.zip")
    assert message(tmp_path / "data.zip").endswith("data.zip is neither a folder nor a file")


def test_file_that_must_not_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *args: str) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    path = write_zip(tmp_path / "data.zip")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError, match=r"Permission denied: '.*data\.zip'"):
        load(path)


@pytest.mark.parametrize(("first", "second"), [("é", "e\u0301"), ("e\u0301", "é")])
def test_accents_that_are_encoded_in_two_ways_are_one_class(tmp_path: Path, first: str, second: str) -> None:
    data = load(
        write(tmp_path / "data", f"train/caf{first}/1.png", f"test/caf{second}/2.png", f"test/caf{first}/3.png")
    )
    assert data.class_names == ("café",)
    assert (len(data.learn), len(data.test)) == (1, 2)


def test_names_that_differ_only_in_spaces_are_refused(tmp_path: Path) -> None:
    text = message(write(tmp_path / "data", "cat/1.png", "cat /2.png"))
    assert text.endswith("the classes 'cat' and 'cat ' look the same. Rename one of them")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_file_with_a_compression_that_cannot_be_read_in_parts_is_refused(tmp_path: Path, method: int) -> None:
    with zipfile.ZipFile(tmp_path / "data.zip", "w", method) as archive:
        archive.writestr("cat/0.png", encoded(pixels_of(0, 0)))
    assert message(tmp_path / "data.zip").endswith(
        "cat/0.png is not compressed by deflate, the usual method. Create the file again"
    )


def test_zip_bomb_with_a_wrong_size_is_not_decompressed(tmp_path: Path) -> None:
    path, size = tmp_path / "data.zip", 400 * 2**20
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("cat/0.png", "w") as entry:
        for _ in range(size // 2**20):
            entry.write(bytes(2**20))
    small = path.read_bytes().replace(struct.pack("<I", size), struct.pack("<I", 100))
    path.write_bytes(small)
    tracemalloc.start()
    try:
        text = message(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "data.zip/cat/0.png cannot be read (Bad CRC-32" in text
    assert peak < size / 10


def test_zip_file_with_a_damaged_copy_of_a_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("Äpfel/0.png", encoded(pixels_of(0, 0)))
    content = bytearray(path.read_bytes())
    content[30] = 0xFF  # of the name before the entry; the directory at the end has another copy
    path.write_bytes(content)
    assert "data.zip/Äpfel/0.png cannot be read ('utf-8' codec can't decode" in message(path)


def test_zip_file_with_a_path_out_of_it_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("../pictures/cat/0.png", encoded(pixels_of(0, 0)))
    assert message(tmp_path / "data.zip").endswith(
        "../pictures/cat/0.png is outside the zip file. Create it in the folder of the pictures"
    )
