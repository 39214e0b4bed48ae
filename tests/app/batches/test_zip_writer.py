import shutil
import subprocess
import zipfile
from pathlib import Path
from zlib import crc32

import pytest

from app.batches.zip_writer import SPOOL_BYTES, ZipWriter

GIB = 1024**3


def test_members_have_the_earliest_date_and_are_not_compressed(tmp_path: Path) -> None:
    path = tmp_path / "small.zip"
    with ZipWriter() as writer, path.open("wb") as file:
        for name, content in (("a.png", b"first"), ("b.png", b"")):
            file.write(writer.header(name, len(content), crc32(content)) + content)
        file.writelines(writer.end())
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert {info.filename: archive.read(info) for info in archive.infolist()} == {"a.png": b"first", "b.png": b""}
        assert {(info.date_time, info.compress_type) for info in archive.infolist()} == {((1980, 1, 1, 0, 0, 0), 0)}
    if unzip := shutil.which("unzip"):
        subprocess.run([unzip, "-tq", str(path)], check=True, capture_output=True)


@pytest.mark.parametrize("size", [0xFFFFFFFE, 0xFFFFFFFF, 5 * GIB])
def test_member_of_4_gib_and_members_after_it_are_read_by_other_programs(tmp_path: Path, size: int) -> None:
    """The large member is a hole in the file."""
    path = tmp_path / "large.zip"
    with ZipWriter() as writer, path.open("wb") as file:
        file.write(writer.header("large", size, 0))
        file.seek(size, 1)
        file.write(writer.header("small", 5, crc32(b"small")) + b"small")
        file.writelines(writer.end())
    with zipfile.ZipFile(path) as archive:
        assert [(info.filename, info.file_size) for info in archive.infolist()] == [("large", size), ("small", 5)]
        assert archive.read("small") == b"small"
        with archive.open("large") as member:
            assert member.read(100) == bytes(100)
    if size != 0xFFFFFFFF and (unzip := shutil.which("unzip")):  # unzip 6.00 takes this size for a missing one
        subprocess.run([unzip, "-tq", str(path), "small"], check=True, capture_output=True)


@pytest.mark.parametrize("count", [65_534, 65_535, 65_536])
def test_directory_on_the_disk_is_complete(tmp_path: Path, count: int) -> None:
    """ZIP64 is needed from 65,535 members on."""
    path = tmp_path / "many.zip"
    with ZipWriter() as writer, path.open("wb") as file:
        for number in range(count):
            file.write(writer.header(f"{number:06d}", 0, 0))
        file.writelines(writer.end())
    assert count * 50 > SPOOL_BYTES
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == [f"{number:06d}" for number in range(count)]
    assert (b"PK\6\6" in path.read_bytes()) == (count >= 65_535)
