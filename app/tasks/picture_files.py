"""Reads the structure of picture files before they are decoded: format, size, number of frames, orientation.

A file is refused here if it is too large, animated, incomplete or of another format. The metadata of PNG, JPEG and GIF
files is removed before decoding, because a few bytes of compressed text or of a colour profile can expand to many
megabytes.
"""

import re
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from struct import error as StructError
from struct import unpack, unpack_from

from model.png import SIGNATURE

MAX_SIDE = 4096  # pixels
# These decoders keep several copies of the whole picture, so fewer pixels fit into the same memory. A JPEG file with
# one scan for each colour counts as progressive.
MAX_PIXELS_WEBP = 2048 * 2048
MAX_PIXELS_PROGRESSIVE = 3 * 2048 * 2048
MAX_PIXELS_PROGRESSIVE_CMYK = 2048 * 2048
MAX_CHUNKS = 20_000  # chunks of a PNG or WebP file, and segments of a JPEG file before its pixels
MAX_BLOCKS = 100_000  # data blocks of a GIF file; most encoders write 255 bytes in a block
MAX_SCANS = 64  # scans of a JPEG file; each scan can need a pass over the whole picture
MAX_TEXT_BYTES = 3000  # of a text chunk that is read
MAX_LABEL_BYTES = 80_000  # of the chunk Label: the names of 64 images, with 100 characters of 12 bytes each in JSON
MAX_KEYWORD_BYTES = 79  # of a text chunk (W3C PNG, section 11.3.3.2)

AS_WRITTEN = "Send the PNG file as the service wrote it"
FORMATS = "PNG, JPEG, WebP or GIF"
ORIENTATION = 0x0112  # the EXIF tag

_IEND = b"IEND"
_PNG_KEPT = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", _IEND}
_SOF = {0xC0, 0xC1, 0xC2, 0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)}  # start of frame
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_FILL = re.compile(rb"\xff*(?=\xff)")  # fill bytes before a JPEG marker
_SOS, _COM, _APP0, _APP1, _APP14, _APP15 = 0xDA, 0xFE, 0xE0, 0xE1, 0xEE, 0xEF
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xDA)}  # markers without a length, which are invalid before the first scan


class PictureError(ValueError):
    """The file is not a permitted picture. The message says what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class PictureFile:
    """A picture file that was checked. `data` is the file, without metadata unless it is a WebP file."""

    format: str  # the name that Pillow uses
    width: int
    height: int
    data: bytes
    orientation: int = 1  # EXIF, 1 to 8


def inspect(data: bytes) -> PictureFile:
    """Checks a picture file without decoding it. Raises PictureError."""
    if not data:
        raise PictureError(f"The file is empty. Send a {FORMATS} file")
    for name, (is_format, read) in _READERS.items():
        if is_format(data):
            try:
                return read(data)
            except (StructError, IndexError):  # The end of the file was reached.
                raise damaged(name) from None
    raise PictureError(f"The file is not a {FORMATS} picture. Convert it to one of these formats")


def read_text(data: bytes, names: Collection[str]) -> dict[str, str]:
    """Returns the text chunks (tEXt) with these names of a PNG file that `inspect` has checked.

    Other text chunks are ignored, and so is compressed text (zTXt, iTXt), which can expand to many megabytes. Raises
    PictureError if a chunk is damaged, too long, or occurs more than once.
    """
    found: dict[str, str] = {}
    position, name = len(SIGNATURE), b""
    while name != _IEND:
        length, name = unpack_from(">I4s", data, position)
        start, end = position + 8, position + 8 + length
        position = end + 4
        if name != b"tEXt":
            continue
        keyword = data[start : min(end, start + MAX_KEYWORD_BYTES + 1)].partition(b"\0")[0].decode("latin-1")
        if keyword not in names:
            continue
        if length > (most := MAX_LABEL_BYTES if keyword == "Label" else MAX_TEXT_BYTES):
            raise PictureError(f"The text chunk {keyword} has more than {most} bytes. {AS_WRITTEN}")
        if keyword in found:
            raise PictureError(f"The text chunk {keyword} occurs more than once. {AS_WRITTEN}")
        if zlib.crc32(memoryview(data)[start - 4 : end]) != unpack_from(">I", data, end)[0]:
            raise damaged("PNG")
        found[keyword] = data[start + len(keyword) + 1 : end].decode("latin-1")
    return found


def damaged(name: str) -> PictureError:
    """Returns the error for a file that is incomplete or has invalid content."""
    return PictureError(f"The {name} file is incomplete or damaged. Save it again and send the complete file")


def _check_size(width: int, height: int, kind: str = "", most: int = MAX_SIDE**2) -> None:
    if max(width, height) > MAX_SIDE:
        raise PictureError(
            f"The picture has {width} x {height} pixels. At most {MAX_SIDE} x {MAX_SIDE} are permitted. Make it smaller"
        )
    if width * height > most:
        raise PictureError(
            f"The picture has {width} x {height} pixels. A {kind} picture can have at most {most} pixels. Make it "
            "smaller, or save it as PNG"
        )


def _animated() -> PictureError:
    return PictureError("The picture is animated. Send a picture with a single frame")


def _read_png(data: bytes) -> PictureFile:
    if data[12:16] != b"IHDR":
        raise damaged("PNG")
    width, height = unpack_from(">II", data, 16)
    _check_size(width, height)
    if not width or not height:
        raise damaged("PNG")
    kept, orientation, position = [SIGNATURE], 0, len(SIGNATURE)
    for _ in range(MAX_CHUNKS):
        length, name = unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            raise damaged("PNG")
        if name == b"acTL" and length == 8 and unpack_from(">I", data, position + 8)[0] > 1:
            raise _animated()
        if name == b"eXIf" and not orientation:
            orientation = _orientation(data[position + 8 : end - 4])
        if name in _PNG_KEPT:
            (checksum,) = unpack_from(">I", data, end - 4)
            if zlib.crc32(memoryview(data)[position + 4 : end - 4]) != checksum:
                raise damaged("PNG")
            kept.append(data[position:end])
        if name == _IEND:
            return PictureFile("PNG", width, height, b"".join(kept), orientation or 1)
        position = end
    raise PictureError(f"The PNG file has more than {MAX_CHUNKS} chunks. Save it again with fewer chunks")


def _read_jpeg(data: bytes) -> PictureFile:
    kept, orientation, frame, scans = [data[:2]], 0, b"", 2
    for marker, start, end in _segments(data):
        scans = end
        if marker in _SOF:
            frame = data[start:end]
        if marker == _APP1 and not orientation and data[start + 4 : start + 10] == b"Exif\0\0":
            orientation = _orientation(data[start + 10 : end])
        # The metadata is left out. APP0 and APP14 describe the colours.
        if marker in (_APP0, _APP14) or not (_APP0 < marker <= _APP15 or marker == _COM):
            kept.append(data[start:end])
    if fill := _FILL.match(data, scans):
        scans = fill.end()  # the marker of the first scan
    height, width, components = unpack_from(">HHB", frame, 5)
    is_progressive = frame[1] in _PROGRESSIVE or data[scans + 4] < components
    most = MAX_PIXELS_PROGRESSIVE if components <= 3 else MAX_PIXELS_PROGRESSIVE_CMYK
    kind = "progressive JPEG" if components <= 3 else "progressive CMYK JPEG"
    _check_size(width, height, kind, most if is_progressive else MAX_SIDE**2)
    if data.count(b"\xff\xda", scans) > MAX_SCANS:
        raise PictureError(f"The JPEG file has more than {MAX_SCANS} scans. Save it again as a baseline JPEG")
    return PictureFile("JPEG", width, height, b"".join([*kept, data[scans:]]), orientation or 1)


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yields the marker, the start and the end of each segment before the first scan (ITU-T T.81, section B.1.1)."""
    position = 2
    for _ in range(MAX_CHUNKS):
        if fill := _FILL.match(data, position):
            position = fill.end()
        marker = data[position + 1]
        if marker == _SOS:
            return
        end = position + 2 + unpack_from(">H", data, position + 2)[0]
        if data[position] != 0xFF or marker in _WITHOUT_LENGTH or end > len(data):
            raise damaged("JPEG")
        yield marker, position, end
        position = end
    raise PictureError(f"The JPEG file has more than {MAX_CHUNKS} segments. Save it again without metadata")


def _read_webp(data: bytes) -> PictureFile:
    width, height = _webp_size(data)
    _check_size(width, height, "WebP", MAX_PIXELS_WEBP)
    orientation, position, num_frames = 0, 12, 0
    end = 8 + unpack_from("<I", data, 4)[0]
    if end > len(data):
        raise damaged("WebP")
    for _ in range(MAX_CHUNKS):
        if position + 8 > end:
            break
        name, length = unpack_from("<4sI", data, position)
        num_frames += name == b"ANMF"
        if name == b"EXIF" and not orientation:
            orientation = _orientation(data[position + 8 : position + 8 + length])
        position += 8 + length + length % 2
    else:
        raise PictureError(f"The WebP file has more than {MAX_CHUNKS} chunks. Save it again without metadata")
    if num_frames > 1:
        raise _animated()
    return PictureFile("WEBP", width, height, data, orientation or 1)


def _webp_size(data: bytes) -> tuple[int, int]:
    """Returns width and height from the first chunk (RFC 9649, sections 2.5 to 2.7)."""
    kind = data[12:16]
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and data[20] == 0x2F:
        (bits,) = unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[i : i + 3], "little") + 1 for i in (24, 27))
        return width, height
    raise damaged("WebP")


def _read_gif(data: bytes) -> PictureFile:
    width, height = unpack_from("<HH", data, 6)
    position = 13 + _colour_table(data[10])
    kept, control, image, num_blocks = [data[:position]], b"", b"", 0
    while position < len(data) and data[position] != 0x3B:  # trailer
        start = position
        if data[position] == 0x21:  # extension
            position, num_blocks = _skip_blocks(data, position + 2, num_blocks)
            control = data[start:position] if data[start + 1] == 0xF9 and not image else control
        elif data[position] == 0x2C:  # image
            if image:
                raise _animated()
            left, top, frame_width, frame_height, flags = unpack_from("<HHHHB", data, position + 1)
            # The decoder enlarges the picture to contain its frame.
            width, height = max(width, left + frame_width), max(height, top + frame_height)
            _check_size(width, height)
            position, num_blocks = _skip_blocks(data, position + 11 + _colour_table(flags), num_blocks)
            image = data[start:position]
        else:
            raise damaged("GIF")
    if not image or not width or not height:
        raise damaged("GIF")
    return PictureFile("GIF", width, height, b"".join([*kept, control, image, b"\x3b"]))


def _colour_table(flags: int) -> int:
    """Returns the size of a GIF colour table in bytes."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _skip_blocks(data: bytes, position: int, num_blocks: int) -> tuple[int, int]:
    """Returns the position after the data blocks that begin at `position`, and the number of blocks so far."""
    while num_blocks < MAX_BLOCKS:
        num_blocks, length = num_blocks + 1, data[position]
        position += 1 + length
        if not length:
            return position, num_blocks
    raise PictureError(f"The GIF file has more than {MAX_BLOCKS} data blocks. Save it again without metadata")


def _orientation(exif: bytes) -> int:
    """Returns the orientation of the first EXIF directory, or 1 if there is none or the metadata is damaged."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if not order:
        return 1
    try:
        (start,) = unpack_from(order + "I", exif, 4)
        (count,) = unpack_from(order + "H", exif, start)
        for i in range(min(count, 1000)):
            entry = exif[start + 2 + 12 * i : start + 14 + 12 * i]
            tag, kind, _, value = unpack(order + "HHIH2x", entry)
            if tag == ORIENTATION and kind == 3 and 1 <= value <= 8:
                return int(value)
    except StructError:
        pass
    return 1


_READERS: dict[str, tuple[Callable[[bytes], bool], Callable[[bytes], PictureFile]]] = {
    "PNG": (lambda data: data.startswith(SIGNATURE), _read_png),
    "JPEG": (lambda data: data.startswith(b"\xff\xd8\xff"), _read_jpeg),
    "WebP": (lambda data: data.startswith(b"RIFF") and data[8:12] == b"WEBP", _read_webp),
    "GIF": (lambda data: data.startswith((b"GIF87a", b"GIF89a")), _read_gif),
}
