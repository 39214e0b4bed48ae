import gzip
import tracemalloc
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from scripts.common.data import arrays
from tests.scripts.common.data.samples import COUNTS, load, message, write_folder, write_idx, write_npz


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
        content = dict(file)
    np.savez(path, **content, class_names=np.array([b"cat", b"dog", "Äpfel".encode()]))
    assert load(path).class_names == ("cat", "dog", "Äpfel")
    np.savez(path, **content, class_names=np.array([b"cat", b"dog", b"\xe9"]))
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


def replaced(path: Path, old: bytes, new: bytes) -> Path:
    """Replaces bytes of an NPZ file and of its array `train_images`, whose checksum is correct again."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    assert old in content["train_images.npy"]
    with zipfile.ZipFile(path, "w") as archive:
        for name, each in content.items():
            archive.writestr(name, each.replace(old, new) if name == "train_images.npy" else each)
    return path


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"(24, 12, 12, 3), }        ", b"(999999999999999, 28, 28)}"),
        (b"(24, 12, 12, 3), }" + b" " * 22, b"(9999999999999999999999999, 28, 28), }  "),
        (b"(24, 12, 12, 3), }", b"(24, 12, 12, 3(, }"),
    ],
)
def test_npz_file_with_a_damaged_shape_is_refused(tmp_path: Path, old: bytes, new: bytes) -> None:
    path = replaced(write_npz(tmp_path / "data.npz"), old, new)
    assert "data.npz cannot be read. It is damaged, or no NPZ file. Save arrays" in message(path)


def test_npz_file_with_a_compression_that_cannot_be_read_in_parts_is_refused(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "data.npz")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_LZMA) as archive:
        archive.writestr("x.npy", b"x")
    assert message(path).endswith("data.npz is not compressed by deflate. Save it with numpy.savez_compressed")


def test_arrays_that_are_too_large_are_refused_before_they_are_decompressed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "MAX_ARRAY_BYTES", 2**30)
    write_npz(tmp_path / "data.npz")
    with zipfile.ZipFile(tmp_path / "data.npz", "a") as archive:
        archive.writestr("x.npy", b"x")
        archive.infolist()[-1].file_size = 2**30
    assert message(tmp_path / "data.npz").endswith("has more than 1 GiB of data. Use fewer or smaller images")
    monkeypatch.setattr(arrays, "MAX_ARRAY_BYTES", 2**20)
    folder = write_idx(tmp_path / "idx")
    load(folder)  # imports torchvision, which needs more memory than what is measured
    with gzip.open(folder / "train-images-idx3-ubyte.gz", "wb") as file:
        for _ in range(400):
            file.write(bytes(2**20))
    tracemalloc.start()
    try:
        assert "train-images-idx3-ubyte.gz has more than 0 GiB of data" in message(folder)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40 * 2**20


def test_full_disk_for_temporary_files_is_not_blamed_on_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_idx(tmp_path / "idx")
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr(arrays, "tempfile", SimpleNamespace(NamedTemporaryFile=lambda: full))
        with pytest.raises(OSError, match="No space left on device"):
            load(folder)


def test_hidden_files_next_to_idx_files_are_ignored(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "idx")
    expected = load(folder).digest
    (folder / "._train-images-idx3-ubyte").write_bytes(b"x")
    assert load(folder).digest == expected


def test_pictures_in_a_folder_with_idx_files_are_refused(tmp_path: Path) -> None:
    root = write_folder(write_idx(tmp_path / "data"))
    text = message(root)
    assert "has IDX files, such as t10k-images-idx3-ubyte.gz, and pictures, such as cat/0.png. Choose a folder" in text


def test_link_to_an_idx_file_outside_is_refused(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "idx")
    path = folder / "train-images-idx3-ubyte.gz"
    path.rename(tmp_path / "images.gz")
    path.symlink_to(tmp_path / "images.gz")
    assert "idx/train-images-idx3-ubyte.gz is a link to a file outside " in message(folder)


@pytest.mark.parametrize("cut", [1, 20, 1000])
def test_idx_file_that_breaks_off_is_refused(tmp_path: Path, cut: int) -> None:
    folder = write_idx(tmp_path / "idx")
    packed, plain = folder / "train-images-idx3-ubyte.gz", folder / "train-images-idx3-ubyte"
    plain.write_bytes(gzip.decompress(packed.read_bytes())[:-cut])
    packed.write_bytes(packed.read_bytes()[:-cut])
    for path in (plain, packed):  # the file without .gz is preferred
        assert message(folder).endswith(f"/{path.name} is not an IDX file, or is damaged. Download or write it again")
        path.unlink()
