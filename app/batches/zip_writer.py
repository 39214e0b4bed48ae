"""Writes a ZIP archive piece by piece, with any number of members in little memory.

Each archive ends with a directory of its members. Python's zipfile has about 390 bytes in memory for each member until
then. Here the directory waits in a temporary file. Members are not compressed and have a constant date, so that equal
members give equal archives. Archives with more than 65,534 members or 4 GiB have the records of ZIP64.
"""

from collections.abc import Iterator
from struct import pack
from tempfile import SpooledTemporaryFile
from typing import Self

SPOOL_BYTES = 1024 * 1024  # of a temporary file are in memory; the rest is on the disk
READ_BYTES = 64 * 1024
MAX_16, MAX_32 = 0xFFFF, 0xFFFFFFFF  # in a field of 16 or 32 bits: the value is in a record of ZIP64
VERSION, VERSION_64 = 20, 45  # of the format: 2.0, and 4.5 for ZIP64
DATE = 1 << 5 | 1  # 1980-01-01, the earliest date of the format


class ZipWriter:
    """The state of an archive. The caller writes what the methods return, and the content of the members."""

    def __init__(self, offset: int = 0) -> None:
        """`offset` is the number of bytes before the first member."""
        self._offset, self._num_members = offset, 0
        self._directory = SpooledTemporaryFile(SPOOL_BYTES)  # noqa: SIM115 # __exit__ closes it

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._directory.close()

    def header(self, name: str, size: int, crc: int) -> bytes:
        """Returns what precedes the content of the next member. The content has `size` bytes and this CRC-32."""
        encoded, offset = name.encode("ascii"), self._offset
        in_place, in_directory = _zip64(size, size), _zip64(size, size, offset)
        header = b"PK\3\4" + _facts(encoded, size, crc, in_place) + encoded + in_place
        facts = pack("<4sH", b"PK\1\2", VERSION_64) + _facts(encoded, size, crc, in_directory)
        self._directory.write(facts + pack("<3H2L", 0, 0, 0, 0, min(offset, MAX_32)) + encoded + in_directory)
        self._offset += len(header) + size
        self._num_members += 1
        return header

    def end(self) -> Iterator[bytes]:
        """Yields the directory and the records after it, which end the archive."""
        count, offset, size = self._num_members, self._offset, self._directory.tell()
        self._directory.seek(0)
        while block := self._directory.read(READ_BYTES):
            yield block
        if count >= MAX_16 or offset >= MAX_32 or size >= MAX_32:
            yield pack("<4sQ2H2L4Q", b"PK\6\6", 44, VERSION_64, VERSION_64, 0, 0, count, count, size, offset)
            yield pack("<4sLQL", b"PK\6\7", 0, offset + size, 1)
        few = min(count, MAX_16)
        yield pack("<4s4H2LH", b"PK\5\6", 0, 0, few, few, min(size, MAX_32), min(offset, MAX_32), 0)


def _facts(name: bytes, size: int, crc: int, extra: bytes) -> bytes:
    """Returns the fields that the header of a member and its entry in the directory have in common."""
    version, short = VERSION_64 if extra else VERSION, min(size, MAX_32)
    return pack("<5H3L2H", version, 0, 0, 0, DATE, crc, short, short, len(name), len(extra))


def _zip64(*values: int) -> bytes:
    """Returns the extra field with the values that need more than 32 bits. It is empty if there are none."""
    large = [value for value in values if value >= MAX_32]
    return pack(f"<2H{len(large)}Q", 1, 8 * len(large), *large) if large else b""
