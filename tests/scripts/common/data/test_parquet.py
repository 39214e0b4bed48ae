from pathlib import Path

import pytest

from tests.scripts.common.data.samples import COUNTS, NAMES, encoded, load, message, pixels_of, write_parquet

pa = pytest.importorskip("pyarrow")
from pyarrow.parquet import write_table  # noqa: E402


def moved(root: Path, **names: str) -> Path:
    """Moves the file of each split."""
    write_parquet(root)
    for split, name in names.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{split}-00000-of-00001.parquet").rename(root / name)
    return root


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


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("fashion_mnist-train.parquet", "fashion_mnist-test.parquet"),
        ("data/fashion_mnist-train.parquet", "data/fashion_mnist-test.parquet"),
        ("default/train/0000.parquet", "default/test/0000.parquet"),
        ("default/partial-train/0000.parquet", "default/partial-test/0000.parquet"),
        ("train.parquet", "dev.parquet"),
    ],
)
def test_split_is_found_in_the_names_of_file_and_folder(tmp_path: Path, train: str, test: str) -> None:
    root = moved(tmp_path / "data", train=train, test=test)
    (root / ".cache").mkdir()
    (root / ".cache" / "other.parquet").write_bytes(b"x")
    data = load(root)
    assert data.class_names == NAMES
    assert (len(data.learn), len(data.test)) == (3 * COUNTS["train"], 3 * COUNTS["test"])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"test": "more.parquet"}, "data/more.parquet: the name has no split, unlike those of other files. Add train"),
        ({"test": "test-train.parquet"}, "The name 'test-train' has the names of several splits. Rename it"),
        (
            {"train": "one/train/0.parquet", "test": "two/test/0.parquet"},
            "data/two have Parquet files of different data. Choose one of the folders",
        ),
    ],
)
def test_files_without_a_clear_split_are_refused(tmp_path: Path, names: dict[str, str], expected: str) -> None:
    text = message(moved(tmp_path / "data", **names))
    assert expected in text, text


def test_pictures_in_a_folder_with_parquet_files_are_refused(tmp_path: Path) -> None:
    root = write_parquet(tmp_path / "data")
    (root / "cat").mkdir()
    (root / "cat" / "0.png").write_bytes(encoded(pixels_of(0, 0)))
    assert "and pictures, such as cat/0.png. Choose a folder that has only one of these kinds" in message(root)


def test_large_label_is_refused_before_names_are_built(tmp_path: Path) -> None:
    rows = {"image": [encoded(pixels_of(0, 0))] * 2, "label": [0, 10**7]}
    write_table(pa.table(rows), tmp_path / "train.parquet")
    assert "the largest label is 10000000. It must be at most 999" in message(tmp_path)


def test_file_without_rows_is_refused(tmp_path: Path) -> None:
    rows = {"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}
    write_table(pa.table(rows), tmp_path / "train.parquet")
    assert "has no pictures. Add at least two of each class" in message(tmp_path)
