import gzip
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import pytest
import torch

from scripts.common.errors import ScriptError
from scripts.common.mnist import load_mnist, split_unlearned, split_validation
from tests.scripts.tiny_training import NUM_IMAGES, NUM_VALIDATION, idx_files, trust_idx_files, write_idx_files

IMAGES = "train-images-idx3-ubyte"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    trust_idx_files(monkeypatch)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", refuse)


def error_of(folder: Path) -> str:
    with pytest.raises(ScriptError) as caught:
        load_mnist("train", folder)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("folder", ["", "mnist", "MNIST/raw"])
def test_idx_files_are_read_exactly(tmp_path: Path, folder: str, packed: bool, split: str) -> None:
    write_idx_files(tmp_path / folder, packed=packed)
    images, labels = load_mnist(split, tmp_path)  # type: ignore[arg-type]
    prefix = "train" if split == "train" else "t10k"
    assert (images.shape, images.dtype) == ((NUM_IMAGES, 1, 28, 28), torch.uint8)
    assert (labels.shape, labels.dtype) == ((NUM_IMAGES,), torch.int64)
    assert bytes(images.flatten().tolist()) == idx_files()[f"{prefix}-images-idx3-ubyte"][16:]
    assert bytes(labels.tolist()) == idx_files()[f"{prefix}-labels-idx1-ubyte"][8:]


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("place", [3, 20, -1])
def test_one_flipped_bit_is_detected(tmp_path: Path, place: int) -> None:
    write_idx_files(tmp_path)
    content = bytearray((tmp_path / IMAGES).read_bytes())
    content[place] ^= 1
    (tmp_path / IMAGES).write_bytes(content)
    assert "is damaged" in error_of(tmp_path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def break_stream(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[40:60] = bytes(20)
    path.write_bytes(content)


def put_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "cannot be read"),
        (break_stream, "cannot be read"),
        (lambda path: path.write_bytes(b"<html>not found</html>"), "cannot be read"),
        (lambda path: path.write_bytes(b""), "is damaged"),
        (lambda path: path.write_bytes(gzip.compress(b"other")), "is damaged"),
        (lambda path: path.unlink(), "cannot be read: No such file"),
        (put_folder, "cannot be read: Is a directory"),
    ],
    ids=["truncated", "broken", "a web page", "empty", "other content", "missing", "a folder"],
)
def test_damaged_file_is_rejected_with_its_path(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    write_idx_files(tmp_path, packed=True)
    path = tmp_path / f"{IMAGES}.gz"
    damage(path)
    assert message in error_of(tmp_path)
    assert str(path) in error_of(tmp_path)


def test_files_with_other_content_are_rejected(tmp_path: Path) -> None:
    write_idx_files(tmp_path)
    assert "its MD5 checksum differs from the original file" in error_of(tmp_path)


@pytest.mark.usefixtures("no_network")
def test_failed_download_gives_a_one_line_error(tmp_path: Path) -> None:
    message = error_of(tmp_path / "data")
    assert "no MNIST files in" in message
    assert "the download failed" in message
    assert "--data-dir" in message


@pytest.mark.usefixtures("no_network")
def test_file_instead_of_the_data_folder_gives_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    assert "no MNIST files in" in error_of(tmp_path / "data")


def test_missing_torchvision_gives_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    assert "torchvision, which downloads them, is not installed" in error_of(tmp_path)


@pytest.mark.usefixtures("tiny")
def test_interrupted_download_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tmp_path / "MNIST" / "raw"
    write_idx_files(raw)
    (raw / "train-labels-idx1-ubyte").unlink()

    def bring(url: str, download_root: str, filename: str, md5: str) -> None:
        name = filename.removesuffix(".gz")
        (Path(download_root) / name).write_bytes(idx_files()[name])

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", bring)
    monkeypatch.setattr("torchvision.datasets.MNIST._load_data", lambda self: (None, None))
    assert len(load_mnist("train", tmp_path)[1]) == NUM_IMAGES


@pytest.mark.usefixtures("tiny")
def test_last_images_are_for_validation_only() -> None:
    images, labels = torch.arange(NUM_IMAGES), torch.arange(NUM_IMAGES) + 100
    learn, validate = split_validation(images, labels)
    assert learn[0].tolist() == list(range(NUM_IMAGES - NUM_VALIDATION))
    assert validate[0].tolist() == list(range(NUM_IMAGES - NUM_VALIDATION, NUM_IMAGES))
    assert (learn[1] - learn[0]).unique().tolist() == (validate[1] - validate[0]).unique().tolist() == [100]


def test_a_thousand_digits_of_each_class_and_of_all_writers_are_left_for_distances(mnist_dir: Path) -> None:
    (images, labels), _ = split_validation(*load_mnist("train", mnist_dir))
    places = torch.arange(len(labels))
    (learned, learned_labels), (unlearned, unlearned_labels) = split_unlearned(places, labels)
    assert unlearned_labels.bincount().tolist() == [1000] * 10
    assert sorted([*learned.tolist(), *unlearned.tolist()]) == places.tolist()
    assert torch.equal(labels[learned], learned_labels)
    assert torch.equal(labels[unlearned], unlearned_labels)
    shares = (
        unlearned.bincount(minlength=len(labels)).view(50, -1).double().mean(dim=1)
    )  # the file is in order of writer
    assert ((shares - 10 / 55).abs() < 0.05).all()
    assert torch.equal(split_unlearned(images, labels)[1][0], images[unlearned])


def test_mnist_has_the_published_statistics(mnist_dir: Path) -> None:
    images, labels = load_mnist("train", mnist_dir)
    assert images.shape == (60_000, 1, 28, 28)
    assert labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert (images / 255.0).mean().item() == pytest.approx(0.1307, abs=5e-5)
    assert (images / 255.0).std().item() == pytest.approx(0.3081, abs=5e-5)
    test_images, test_labels = load_mnist("test", mnist_dir)
    assert test_images.shape == (10_000, 1, 28, 28)
    assert test_labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
