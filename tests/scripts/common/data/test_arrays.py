from pathlib import Path

import numpy as np

from tests.scripts.common.data.samples import COUNTS, load, message, write_idx, write_npz


def renamed(folder: Path, prefix: str) -> Path:
    for path in list(folder.iterdir()):
        path.rename(folder / f"{prefix}{path.name}")
    return folder


def test_file_with_a_single_array_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "data.npz").open("wb") as file:
        np.save(file, np.zeros((4, 8, 8), np.uint8))
    assert "data.npz cannot be read. It is damaged, or no NPZ file. Save arrays" in message(tmp_path / "data.npz")


def test_class_names_can_be_bytes(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "data.npz", names=False)
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **arrays, class_names=np.array([b"cat", b"dog", "Äpfel".encode()]))
    assert load(path).class_names == ("cat", "dog", "Äpfel")
    np.savez(path, **arrays, class_names=np.array([b"cat", b"dog", b"\xe9"]))
    assert "the class '\\udce9' needs a name of 1 to 100 printable characters" in message(path)


def test_numbers_that_do_not_occur_are_no_classes(tmp_path: Path) -> None:
    labels = np.array([1, 1, 3, 3])
    np.savez(tmp_path / "data.npz", train_images=np.zeros((4, 8, 8), np.uint8), train_labels=labels)
    data = load(tmp_path / "data.npz")
    assert data.class_names == ("1", "3")
    assert sorted(data.learn.labels.tolist() + data.validate.labels.tolist()) == [0, 0, 1, 1]


def test_idx_files_can_have_names_as_those_of_emnist(tmp_path: Path) -> None:
    expected = load(write_idx(tmp_path / "mnist"))
    data = load(renamed(write_idx(tmp_path / "emnist"), "emnist-letters-"))
    assert data.digest == expected.digest
    assert (len(data.learn), len(data.test)) == (3 * COUNTS["train"], 3 * COUNTS["test"])


def test_idx_files_of_two_data_sets_are_refused(tmp_path: Path) -> None:
    write_idx(renamed(write_idx(tmp_path), "emnist-letters-"))
    assert "emnist-letters-t10k-images-idx3-ubyte and t10k-images-idx3-ubyte both have images for the split 'test'" in (
        message(tmp_path)
    )


def test_idx_files_without_a_split_or_labels_are_refused(tmp_path: Path) -> None:
    (write_idx(tmp_path) / "train-labels-idx1-ubyte").unlink()
    assert "has no file train-labels-idx1-ubyte, with the labels of the images. Add it" in message(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").rename(tmp_path / "my-images-idx3-ubyte.gz")
    assert "the name my-images-idx3-ubyte does not say what the images are for. Add" in message(tmp_path)
