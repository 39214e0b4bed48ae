"""The images of a batch as one file: a ZIP archive or a Parquet file.

Both are written in blocks while the answers are read. The memory does not grow with the number of images, except for
the list of row groups of Parquet. The files are data sets of the Hugging Face Hub: `load_dataset("imagefolder")` reads
the unpacked archive, and `load_dataset("parquet")` reads the Parquet file.
"""

import importlib
import io
import json
import re
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from tempfile import SpooledTemporaryFile
from typing import Annotated, Any
from zlib import crc32

from PIL import Image
from pydantic import AliasChoices, Base64Bytes, BaseModel, Field, ValidationError

from app.batches.records import Line
from app.batches.zip_writer import READ_BYTES, SPOOL_BYTES, ZipWriter
from app.errors import NotAvailable

INDEX = "metadata.jsonl"  # the member of the archive with a line for each image; the name is that of the Hub
MAX_NAME = 80  # characters of a custom_id in the name of a file
BLOCK_BYTES = 256 * 1024
EMPTY_PARTS = 200  # answers without images, which can take long to read
GROUP_ROWS, GROUP_BYTES = 1000, 8 * 1024 * 1024  # limits of a row group of Parquet; its images are in memory
NEEDS_PYARROW = "Parquet files need pyarrow, which is not installed. Install it with: pip install -e '.[parquet]'"
# The columns besides `image`, and the keys of a line of the index besides `file_name` -> type.
COLUMNS = {"custom_id": "string", "line": "int64", "index": "int32", "seed": "int64", "label": "string"}

Answers = Iterable[tuple[Line, bytes]]
Blocks = Generator[bytes, None, None]


class _Picture(BaseModel):
    """An image of an answer in the format of OpenAI or of this project."""

    png: Base64Bytes = Field(validation_alias=AliasChoices("b64_json", "png"))
    index: Annotated[int, Field(ge=0, lt=2**31)] | None = None


class _Answer(BaseModel):
    """An answer with images. Other answers do not have this form."""

    images: list[_Picture] = Field(validation_alias=AliasChoices("data", "images"))
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None


@dataclass(frozen=True, slots=True)
class _Image:
    name: str  # of the file
    png: bytes
    facts: dict[str, Any]  # a value for each of COLUMNS


def zip_blocks(answers: Answers) -> Blocks:
    """Yields a ZIP archive with the PNG files of the answers, and INDEX as its last member.

    The same answers give the same bytes.
    """
    return _joined(_zip_parts(answers))


def parquet_blocks(answers: Answers) -> Blocks:
    """Yields a Parquet file with a row for each image. Raises NotAvailable if pyarrow is not installed.

    The same answers give the same bytes with the same release of pyarrow.
    """
    try:
        pa, pq = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise NotAvailable(NEEDS_PYARROW) from error
    return _joined(_parquet_parts(pa, pq, answers))


def _zip_parts(answers: Answers) -> Iterator[bytes]:
    with ZipWriter() as archive, SpooledTemporaryFile(SPOOL_BYTES) as index:
        crc = 0
        for image in _images(answers):
            if image is None:
                yield b""
                continue
            yield archive.header(image.name, len(image.png), crc32(image.png))
            yield image.png
            row = json.dumps({"file_name": image.name, **image.facts}).encode() + b"\n"
            index.write(row)
            crc = crc32(row, crc)
        yield archive.header(INDEX, index.tell(), crc)
        index.seek(0)
        while block := index.read(READ_BYTES):
            yield block
        yield from archive.end()


def _parquet_parts(pa: Any, pq: Any, answers: Answers) -> Iterator[bytes]:
    types = {"image": pa.struct({"bytes": pa.binary(), "path": pa.string()})}
    types |= {name: pa.type_for_alias(dtype) for name, dtype in COLUMNS.items()}
    features = {name: {"dtype": dtype, "_type": "Value"} for name, dtype in COLUMNS.items()}
    info = {"info": {"features": {"image": {"_type": "Image"}, **features}}}
    schema = pa.schema(types, metadata={"huggingface": json.dumps(info)})
    sink = _Sink()
    # Statistics of the images would stay in memory until the end, and no query selects rows by the bytes of an image.
    options = {"use_dictionary": ["seed", "label"], "write_statistics": list(COLUMNS)}
    with pq.ParquetWriter(sink, schema, **options) as writer:
        for rows in _groups(answers):
            if rows:
                writer.write_table(pa.Table.from_pylist(rows, schema), row_group_size=len(rows))
            yield b"".join(sink.take())
    yield from sink.take()  # the end of the file


def _groups(answers: Answers) -> Iterator[list[dict[str, Any]]]:
    """Yields the rows of each row group, and an empty list for each answer without images."""
    rows, size = list[dict[str, Any]](), 0
    for image in _images(answers):
        if image is None:
            yield []
            continue
        rows.append({"image": {"bytes": image.png, "path": image.name}, **image.facts})
        size += len(image.png)
        if len(rows) == GROUP_ROWS or size >= GROUP_BYTES:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


class _Sink(io.RawIOBase):
    """A file that keeps what is written to it until it is taken."""

    def __init__(self) -> None:
        super().__init__()
        self._parts = list[bytes]()

    def writable(self) -> bool:
        """Returns True. pyarrow checks this before it writes."""
        return True

    def write(self, data: Any) -> int:
        """Keeps a copy of the bytes."""
        self._parts.append(bytes(data))
        return len(data)

    def take(self) -> list[bytes]:
        """Returns what was written since the last call."""
        parts, self._parts = self._parts, []
        return parts


def _joined(parts: Iterable[bytes]) -> Blocks:
    """Yields the same bytes in blocks of at least BLOCK_BYTES, except for the last one.

    Answers without images add nothing. An empty block after EMPTY_PARTS of them lets the caller stop.
    """
    block, num_empty = bytearray(), 0
    for part in parts:
        block += part
        num_empty = 0 if part else num_empty + 1
        if len(block) >= BLOCK_BYTES or num_empty == EMPTY_PARTS:
            yield bytes(block)
            block.clear()
            num_empty = 0
    if block:
        yield bytes(block)


def _images(answers: Answers) -> Iterator[_Image | None]:
    """Yields the images of the answers, and None for an answer without images or in an unknown form."""
    for line, body in answers:
        try:
            answer = _Answer.model_validate_json(body)
        except ValidationError:
            yield None
            continue
        if not answer.images:
            yield None
        for position, picture in enumerate(answer.images):
            facts = {
                "custom_id": line.custom_id,
                "line": line.number,
                "index": position if picture.index is None else picture.index,
                "seed": answer.seed,
                "label": _label_in(picture.png),
            }
            yield _Image(_name_of(line, position), picture.png, facts)


def _name_of(line: Line, position: int) -> str:
    """Returns the name of a file. The number of the line and the position in its answer make it unique."""
    safe = re.sub(r"(?:[^0-9A-Za-z_.-]|\.{2,})+", "-", line.custom_id)[:MAX_NAME]
    return f"{line.number:06d}-{safe}-{position}.png"


def _label_in(png: bytes) -> str | None:
    """Returns the name of the class in the text chunks of a PNG file (see model/png.py), or None.

    Answers in the format of OpenAI have it only there.
    """
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            text = str(image.info.get("Label", ""))
        label = json.loads(text) if text.startswith(('"', "[")) else text
    except (OSError, SyntaxError, ValueError):  # It is not a PNG file of this project.
        return None
    return label if isinstance(label, str) and label else None
