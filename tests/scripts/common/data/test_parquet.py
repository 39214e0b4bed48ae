import json
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


def write_named(path: Path, names: list[str] | None, labels: list[int]) -> None:
    """Writes pictures with numbers as labels, and the names of the classes as the package `datasets` stores them."""
    table = pa.table({"image": [encoded(pixels_of(label, 0)) for label in labels], "label": labels})
    features = {"label": {"names": names, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if names else {}
    write_table(table.replace_schema_metadata(metadata), path)


@pytest.mark.parametrize("names", [["light", "dark"], ["dark"], ["dark", "light", "grey"], None])
def test_files_whose_class_names_differ_are_refused(tmp_path: Path, names: list[str] | None) -> None:
    for train, test in ((["dark", "light"], names), (names, ["dark", "light"])):
        write_named(tmp_path / "train.parquet", train, [0, 1, 0, 1])
        write_named(tmp_path / "test.parquet", test, [0, 0])
        assert "test.parquet and " in (text := message(tmp_path))
        assert text.endswith(
            "train.parquet do not have the same class names in the same order. Write both with the same"
        )


def test_labels_that_pyarrow_cannot_convert_are_refused(tmp_path: Path) -> None:
    image, invalid = encoded(pixels_of(0, 0)), [b"caf\xe9", b"b"]
    text = pa.Array.from_buffers(pa.string(), 2, pa.array(invalid, pa.binary()).buffers())
    for labels in (text, pa.array([2**62] * 2, pa.timestamp("ms"))):
        write_table(pa.table({"image": [image] * 2, "label": labels}), tmp_path / "train.parquet")
        assert "train.parquet, row 0 cannot be read (" in (said := message(tmp_path))
        assert said.endswith(". Write the file again")


def test_class_names_that_are_nested_too_deeply_are_ignored(tmp_path: Path) -> None:
    table = pa.table({"image": [encoded(pixels_of(label, 0)) for label in (0, 1) * 2], "label": [0, 1] * 2})
    write_table(table.replace_schema_metadata({"huggingface": "[" * 100_000}), tmp_path / "train.parquet")
    assert load(tmp_path).class_names == ("0", "1")


def test_link_to_a_parquet_file_outside_is_refused(tmp_path: Path) -> None:
    root = write_parquet(tmp_path / "data")
    for name in ("elsewhere.parquet", "missing.parquet"):
        (root / "train-1.parquet").unlink(missing_ok=True)
        (root / "train-1.parquet").symlink_to(tmp_path / name)
        (tmp_path / "elsewhere.parquet").write_bytes(b"x")
        wanted = "a file outside" if name == "elsewhere.parquet" else "a file that does not exist. Remove it"
        assert f"data/train-1.parquet is a link to {wanted}" in message(root)
