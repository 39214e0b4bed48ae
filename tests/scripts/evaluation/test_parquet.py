import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from scripts.common.errors import ScriptError
from scripts.evaluation.dataset_files import Rows
from scripts.evaluation.parquet import FILE, ROW_GROUP, find_parquet, read_parquet, write_parquet


def random_rows(count: int, *, confidence: bool = False) -> Rows:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
    given = generator.random(count, dtype=np.float32) if confidence else None
    return Rows(images, generator.integers(0, 10, count), np.arange(7, 7 + count), given)


def test_columns_have_the_features_of_an_image_classification_data_set(tmp_path: Path) -> None:
    """The expected schema is that of ylecun/mnist on the Hugging Face Hub, with three further columns."""
    write_parquet(tmp_path, random_rows(3, confidence=True), seed=5)
    schema = pq.read_schema(tmp_path / "data" / "train-00000-of-00001.parquet")
    assert schema.field("image").type == pa.struct({"bytes": pa.binary(), "path": pa.string()})
    assert {name: str(schema.field(name).type) for name in schema.names[1:]} == {
        "label": "int64",
        "seed": "int64",
        "index": "int64",
        "confidence": "float",
    }
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == schema.names
    assert features["image"] == {"_type": "Image"}
    assert features["label"] == {"names": ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"], "_type": "ClassLabel"}


def test_rows_are_in_groups_and_contain_what_was_written(tmp_path: Path) -> None:
    rows = random_rows(ROW_GROUP + 5)
    write_parquet(tmp_path, rows, seed=2**53 - 1)
    file = pq.ParquetFile(tmp_path / FILE)
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [ROW_GROUP, 5]
    read: list[dict[str, Any]] = file.read().to_pylist()
    assert set(read[0]) == {"image", "label", "seed", "index"}
    for row, image, label, index in zip(read, rows.images, rows.labels, rows.noise_index, strict=True):
        with Image.open(io.BytesIO(row["image"]["bytes"])) as png:
            assert png.format == "PNG"
            assert np.array_equal(np.asarray(png), image)
        assert (row["label"], row["seed"], row["index"]) == (label, 2**53 - 1, index)
        assert row["image"]["path"] == f"digit-{label}-seed-{2**53 - 1}-{index}.png"


def test_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_parquet(tmp_path / name, random_rows(50, confidence=True), seed=5)
    assert (tmp_path / "first" / FILE).read_bytes() == (tmp_path / "second" / FILE).read_bytes()


def test_several_files_are_read_in_order(tmp_path: Path) -> None:
    rows = random_rows(6)
    for part in range(2):
        half = slice(3 * part, 3 * part + 3)
        write_parquet(tmp_path, Rows(rows.images[half], rows.labels[half], rows.noise_index[half]), seed=5)
        (tmp_path / FILE).rename(tmp_path / "data" / f"train-0000{part}-of-00002.parquet")
    images, labels = read_parquet(find_parquet(tmp_path))
    assert labels.tolist() == rows.labels.tolist()
    assert [np.asarray(Image.open(io.BytesIO(content))).tolist() for _, content in images] == rows.images.tolist()


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"image": [{"bytes": b"a"}]}, "is not a Parquet file with"),
        ({"image": [b"a"], "label": [1]}, "is not a Parquet file with"),
        ({"image": [{"bytes": None}], "label": [1]}, "is not a Parquet file with"),
        ({"image": [{"bytes": b"a"}], "label": [None]}, "is not a Parquet file with"),
        ({"image": [{"bytes": b"a"}], "label": ["one"]}, "is not a Parquet file with"),
        ({"image": [{"bytes": b"a"}], "label": [10]}, "labels from 0 to 9"),
        ({"image": [{"bytes": b"a"}], "label": [-1]}, "labels from 0 to 9"),
        (None, "is not a Parquet file with"),
    ],
    ids=["no label", "no struct", "no bytes", "null label", "text label", "label 10", "label -1", "no Parquet"],
)
def test_other_content_gives_an_error(tmp_path: Path, columns: dict[str, list[Any]] | None, reason: str) -> None:
    path = tmp_path / "other.parquet"
    if columns is None:
        path.write_bytes(b"PAR1")
    else:
        pq.write_table(pa.table(columns), path)
    with pytest.raises(ScriptError, match=reason):
        read_parquet([path])
