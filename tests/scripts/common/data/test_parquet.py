from pathlib import Path

import pytest

from tests.scripts.common.data.samples import encoded, load, message, pixels_of

pa = pytest.importorskip("pyarrow")
from pyarrow.parquet import write_table  # noqa: E402


@pytest.mark.parametrize(("first", "second"), [([0, 1], ["cat", "dog"]), (["cat", "dog"], [0, 1])])
def test_labels_that_are_numbers_in_one_parquet_file_and_texts_in_another_are_refused(
    tmp_path: Path, first: list[int | str], second: list[int | str]
) -> None:
    image = encoded(pixels_of(0, 0))
    for number, labels in enumerate((first, second)):
        write_table(pa.table({"image": [image] * 2, "label": labels}), tmp_path / f"train-{number}.parquet")
    assert f"train-1.parquet, row 0: the label {second[0]!r} cannot be used." in message(tmp_path)


def test_texts_of_a_parquet_file_become_names_in_alphabetical_order(tmp_path: Path) -> None:
    rows = {
        "image": [encoded(pixels_of(label, i)) for label in (0, 1) for i in (0, 1)],
        "label": ["eel"] * 2 + ["cat"] * 2,
    }
    write_table(pa.table(rows), tmp_path / "train.parquet")
    data = load(tmp_path)
    assert data.class_names == ("cat", "eel")
    assert data.learn.labels.tolist() == [1, 0]


def test_large_label_is_refused_before_names_are_built(tmp_path: Path) -> None:
    rows = {"image": [encoded(pixels_of(0, 0))] * 2, "label": [0, 10**7]}
    write_table(pa.table(rows), tmp_path / "train.parquet")
    assert "the largest label is 10000000. It must be at most 999" in message(tmp_path)


def test_file_without_rows_is_refused(tmp_path: Path) -> None:
    rows = {"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}
    write_table(pa.table(rows), tmp_path / "train.parquet")
    assert "has no pictures. Add at least two of each class" in message(tmp_path)
