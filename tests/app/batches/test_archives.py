"""Tests of the archives with the images of a batch. Other programs read them: zipfile, unzip and pyarrow."""

import base64
import io
import json
import shutil
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.batches import archives, zip_writer
from app.batches.archives import BLOCK_BYTES, COLUMNS, GROUP_BYTES, GROUP_ROWS, INDEX, parquet_blocks, zip_blocks
from app.batches.records import Line
from app.errors import NotAvailable, StorageUnavailable
from model.png import MAX_SEED, Provenance, encode_pixels
from tests.scripts.extras import hide

FORMATS = [zip_blocks, parquet_blocks]
RECOGNISED = {"label": "7", "digit": 7, "probabilities": [0.1] * 10, "model": {"name": "default", "sha256": "0"}}


def line(number: int = 1, custom_id: str = "request") -> Line:
    return Line("batch_0", number, custom_id, "/v1/images/generations", b"")


def png_of(label: str | None, shade: int = 0, side: int = 28) -> bytes:
    """Returns a PNG file as the service writes it, of pixels with random values."""
    labels = () if label is None else (label,)
    provenance = Provenance(labels, 1, "ddim", 10, 1.0, "0" * 64, has_digits=False)
    pixels = np.random.default_rng(shade).integers(0, 256, (side, side), dtype=np.uint8)
    return encode_pixels(pixels, text=provenance.text(0))


def openai_answer(*pngs: bytes, seed: int = 5) -> bytes:
    data = [{"b64_json": base64.b64encode(png).decode(), "revised_prompt": "A digit"} for png in pngs]
    return json.dumps({"created": 1, "data": data, "seed": seed, "model": "default", "size": "28x28"}).encode()


def native_answer(*pngs: bytes, seed: int = 5, first: int = 0) -> bytes:
    images = [{"index": i, "png": base64.b64encode(png).decode()} for i, png in enumerate(pngs, first)]
    return json.dumps({"label": "7", "count": len(pngs), "seed": seed, "images": images}).encode()


def many(count: int) -> Iterator[tuple[Line, bytes]]:
    """Yields answers with two files of 1 KB each, for `count` files in total."""
    generator = np.random.default_rng(0)
    for number in range(1, count // 2 + 1):
        yield line(number, f"request-{number}"), openai_answer(generator.bytes(1000), generator.bytes(1000))


def unzipped(blocks: Iterable[bytes]) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """Returns the PNG files of an archive by name, and the lines of its index. Fails if a member is damaged."""
    with zipfile.ZipFile(io.BytesIO(b"".join(blocks))) as archive:
        assert archive.testzip() is None
        files = {name: archive.read(name) for name in archive.namelist()}
    assert list(files)[-1] == INDEX
    return files, [json.loads(row) for row in files.pop(INDEX).splitlines()]


def table_of(blocks: Iterable[bytes]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(b"".join(blocks))).to_pylist()
    return rows


def test_zip_has_the_files_of_both_formats_and_an_index() -> None:
    seven, truck, unknown = png_of("7"), png_of("Lkw \N{TRIANGULAR FLAG ON POST}", 1), png_of(None, 2)
    answers = [
        (line(2, "first"), openai_answer(seven, unknown, seed=MAX_SEED)),
        (line(11, "second"), native_answer(truck, seed=0, first=4)),
    ]
    files, index = unzipped(zip_blocks(answers))
    assert files == {"000002-first-0.png": seven, "000002-first-1.png": unknown, "000011-second-0.png": truck}
    first = {"custom_id": "first", "line": 2, "seed": MAX_SEED}
    assert index == [
        {"file_name": "000002-first-0.png", **first, "index": 0, "label": "7"},
        {"file_name": "000002-first-1.png", **first, "index": 1, "label": None},
        {
            "file_name": "000011-second-0.png",
            "custom_id": "second",
            "line": 11,
            "index": 4,
            "seed": 0,
            "label": "Lkw \N{TRIANGULAR FLAG ON POST}",
        },
    ]


def test_parquet_has_the_rows_of_the_index_and_the_images() -> None:
    answers = [
        (line(2, "first"), openai_answer(png_of("7"), png_of(None, 2), seed=MAX_SEED)),
        (line(11, "second"), native_answer(png_of("truck", 1), seed=0, first=4)),
    ]
    files, index = unzipped(zip_blocks(answers))
    rows = table_of(parquet_blocks(answers))
    assert {row["image"]["path"]: row["image"]["bytes"] for row in rows} == files
    assert [{"file_name": row.pop("image")["path"], **row} for row in rows] == index


def test_parquet_has_the_features_of_the_hugging_face_hub() -> None:
    schema = pq.read_schema(io.BytesIO(b"".join(parquet_blocks([]))))
    assert schema.field("image").type == pa.struct({"bytes": pa.binary(), "path": pa.string()})
    assert {name: str(schema.field(name).type) for name in schema.names[1:]} == {
        "custom_id": "string",
        "line": "int64",
        "index": "int32",
        "seed": "int64",
        "label": "string",
    }
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    types = {name: each["dtype"] for name, each in features.items() if each["_type"] == "Value"}
    assert list(features) == schema.names
    assert types == COLUMNS


@pytest.mark.parametrize(
    "body",
    [
        json.dumps(RECOGNISED).encode(),
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b'{"data": "text"}',
        b'{"data": [{"embedding": [0.1]}]}',
        b'{"images": [{"index": 0, "png": "a"}]}',
        b'{"images": [{"index": -1, "png": "AAAA"}]}',
        b'{"data": [{"b64_json": "AAAA"}], "seed": 9223372036854775808}',
    ],
)
def test_answer_without_images_or_in_an_unknown_form_adds_nothing(body: bytes) -> None:
    assert unzipped(zip_blocks([(line(), body)])) == ({}, [])
    assert table_of(parquet_blocks([(line(), body)])) == []
    both = [(line(), body), (line(2), openai_answer(png_of("7")))]
    assert list(unzipped(zip_blocks(both))[0]) == ["000002-request-0.png"]


@pytest.mark.parametrize("blocks_of", FORMATS)
def test_batch_without_answers_gives_an_empty_archive(blocks_of: Callable[..., Iterator[bytes]]) -> None:
    content = b"".join(blocks_of([]))
    if blocks_of is zip_blocks:
        assert unzipped([content]) == ({}, [])
    else:
        assert pq.read_metadata(io.BytesIO(content)).num_rows == 0


@pytest.mark.parametrize("png", [b"", b"no PNG", png_of("7")[:40], png_of("7")[:-4]])
def test_image_that_cannot_be_read_is_kept_without_a_label(png: bytes) -> None:
    files, index = unzipped(zip_blocks([(line(), openai_answer(png))]))
    assert files == {"000001-request-0.png": png}
    assert index[0]["label"] in (None, "7")


@pytest.mark.parametrize(
    ("custom_id", "name"),
    [
        ("../../etc/passwd", "000001--etc-passwd-0.png"),
        ("/absolute", "000001--absolute-0.png"),
        ("C:\\a\\..\\b", "000001-C-a-b-0.png"),
        ("a.b_c-D", "000001-a.b_c-D-0.png"),
        ("a...b", "000001-a-b-0.png"),
        (".\N{FULLWIDTH FULL STOP}.", "000001-.-.-0.png"),
        ("\N{LATIN SMALL LETTER U WITH DIAERESIS}\0\n", "000001---0.png"),
        ("x" * 81, f"000001-{'x' * 80}-0.png"),
        ("", "000001--0.png"),
    ],
)
def test_names_of_files_have_only_safe_characters(custom_id: str, name: str) -> None:
    files, index = unzipped(zip_blocks([(line(1, custom_id), openai_answer(png_of("7")))]))
    assert list(files) == [name]
    assert (index[0]["file_name"], index[0]["custom_id"]) == (name, custom_id)


def test_files_of_the_same_custom_id_have_different_names() -> None:
    answers = [(line(number, custom_id), openai_answer(b"1", b"2")) for number, custom_id in ((1, "a"), (2, "a"))]
    assert len(unzipped(zip_blocks(answers))[0]) == 4


@pytest.mark.parametrize("blocks_of", FORMATS)
def test_same_answers_give_the_same_bytes(blocks_of: Callable[..., Iterator[bytes]]) -> None:
    assert b"".join(blocks_of(many(50))) == b"".join(blocks_of(many(50)))


def test_zip_with_more_members_than_16_bits_can_count_is_read_by_other_programs(tmp_path: Path) -> None:
    body, path = openai_answer(*[b"png"] * 10), tmp_path / "images.zip"
    path.write_bytes(b"".join(zip_blocks((line(number), body) for number in range(1, 6555))))
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        assert (len(names), names[65_535]) == (65_541, "006554-request-5.png")
        assert archive.read(names[65_535]) == b"png"
    if unzip := shutil.which("unzip"):
        subprocess.run([unzip, "-tq", str(path)], check=True, capture_output=True)


@pytest.mark.parametrize("blocks_of", FORMATS)
def test_blocks_are_large_and_the_groups_of_rows_are_limited(blocks_of: Callable[..., Iterator[bytes]]) -> None:
    blocks = list(blocks_of(many(2 * GROUP_ROWS + 10)))
    assert len(blocks) > 2
    assert all(BLOCK_BYTES <= len(block) < 8 * BLOCK_BYTES for block in blocks[:-1])
    if blocks_of is parquet_blocks:
        metadata = pq.read_metadata(io.BytesIO(b"".join(blocks)))
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        assert sizes == [GROUP_ROWS, GROUP_ROWS, 10]


def test_group_of_large_images_has_few_rows() -> None:
    png = png_of("7", side=1500)
    answers = [(line(number), openai_answer(png)) for number in range(1, 7)]
    metadata = pq.read_metadata(io.BytesIO(b"".join(parquet_blocks(answers))))
    most = -(-GROUP_BYTES // len(png))
    assert most < 6
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [most, 6 - most]


@pytest.mark.parametrize("blocks_of", FORMATS)
def test_memory_does_not_grow_with_the_number_of_images(
    blocks_of: Callable[..., Iterator[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (archives, zip_writer):
        monkeypatch.setattr(module, "SPOOL_BYTES", 10_000)  # The temporary files are soon on the disk.

    def peak(count: int) -> int:
        tracemalloc.start()
        try:
            arrow = max(pa.total_allocated_bytes() for _ in blocks_of(many(count)))
            return arrow + tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(2)  # imports modules
    assert peak(10_000) < 1.2 * peak(2000)


@pytest.mark.parametrize("blocks_of", FORMATS)
def test_error_of_the_answers_ends_the_archive_without_its_end(blocks_of: Callable[..., Iterator[bytes]]) -> None:
    def failing() -> Iterator[tuple[Line, bytes]]:
        yield from many(4000)
        raise StorageUnavailable(5)

    received = io.BytesIO()
    with pytest.raises(StorageUnavailable):
        for block in blocks_of(failing()):
            received.write(block)
    assert received.tell() > 0
    with pytest.raises((zipfile.BadZipFile, pa.ArrowInvalid)):
        zipfile.ZipFile(received) if blocks_of is zip_blocks else pq.read_table(received)


@pytest.mark.parametrize("blocks_of", FORMATS)
def test_closed_archive_stops_reading_the_answers(blocks_of: Callable[..., Any]) -> None:
    ends = list[str]()

    def answers() -> Iterator[tuple[Line, bytes]]:
        try:
            yield from many(10_000)
            ends.append("read")
        finally:
            ends.append("closed")

    blocks = blocks_of(answers())
    next(blocks)
    blocks.close()
    assert ends == ["closed"]


def test_parquet_without_pyarrow_names_the_extra_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hide("pyarrow", monkeypatch)
    assert sys.modules["pyarrow"] is None
    with pytest.raises(NotAvailable, match=r"pip install -e '\.\[parquet\]'"):
        archives.parquet_blocks([])
