import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from model import checkpoint
from model.png import encode_png
from model.sampler import Guidance
from scripts.common.data.data_set import ImageSet
from scripts.common.drawing import Drawer, DrawingOptions
from scripts.common.errors import ScriptError
from scripts.common.mnist import load_mnist, split_unlearned, split_validation
from scripts.common.progress import Reporter
from scripts.evaluation.dataset_files import IDX, Rows, write_idx
from scripts.evaluation.parquet import FILE, write_parquet
from scripts.evaluation.samples import (
    SPLITS,
    balanced,
    draw_samples,
    load_references,
    read_samples,
)
from tests.scripts.evaluation.bars import bars
from tests.scripts.tiny_checkpoint import save_tiny_checkpoint
from tests.scripts.tiny_training import NUM_VALIDATION, trust_idx_files, write_idx_files


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def rows_of(digits: ImageSet) -> Rows:
    return Rows(digits.images[:, 0].numpy(), digits.labels.numpy(), np.arange(len(digits.labels)))


def unique_images(digits: ImageSet) -> set[bytes]:
    return {image.numpy().tobytes() for image in digits.images}


def test_generated_digits_are_balanced_and_have_8_bits(tmp_path: Path) -> None:
    drawer = Drawer(checkpoint.load(save_tiny_checkpoint(tmp_path / "tiny.safetensors")))
    options = DrawingOptions("ddim", 2, Guidance())
    with Reporter() as reporter:
        digits = draw_samples(drawer, options, reporter, num_images=30, seed=1, batch_size=7)
        x_0 = drawer.draw(torch.tensor([4]), torch.tensor([14]), options, reporter, seed=1)[0]
    assert digits.labels.bincount().tolist() == [3] * 10
    assert (digits.images.dtype, digits.images.shape) == (torch.uint8, (30, 1, 28, 28))
    assert ((digits.images[14] / 127.5 - 1) - x_0).abs().max() <= 1 / 127.5


def test_folder_is_read_by_file_names_or_folder_names(tmp_path: Path) -> None:
    digits = bars(100, 0)
    for i, (image, label) in enumerate(zip(digits.images[:, 0].numpy(), digits.labels.tolist(), strict=True)):
        write(tmp_path / "by file" / f"digit-{label}-seed-5-{i // 10}.png", image)
        write(tmp_path / "by folder" / str(label) / f"{i // 10}.png", image)
    expected = digits.rows(digits.labels.argsort(stable=True))
    for folder in ("by file", "by folder"):
        read = read_samples(tmp_path / folder)
        assert torch.equal(read.labels, expected.labels)
        assert torch.equal(read.images, expected.images)


def test_idx_files_are_read_as_written(tmp_path: Path) -> None:
    digits = bars(100, 2)
    write_idx(tmp_path, rows_of(digits))
    read = read_samples(tmp_path)
    assert read.images.equal(digits.images)
    assert read.labels.equal(digits.labels)


@pytest.mark.parametrize("content", [b"", b"seven"])
def test_invalid_idx_files_give_an_error(tmp_path: Path, content: bytes) -> None:
    for name in IDX:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ScriptError, match="not valid IDX files"):
        read_samples(tmp_path)


def test_wrong_number_of_labels_gives_an_error(tmp_path: Path) -> None:
    write_idx(tmp_path, rows_of(bars(100, 2)))
    labels = (tmp_path / IDX[1]).read_bytes()
    write_idx(tmp_path, rows_of(bars(110, 2)))
    (tmp_path / IDX[1]).write_bytes(labels)
    with pytest.raises(ScriptError, match="inconsistent: 110 images, 100 labels"):
        read_samples(tmp_path)


GREY = np.zeros((28, 28), dtype=np.uint8)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "has no PNG"),
        ({"seven.png": GREY}, "unknown digit"),
        ({"digit-7-a.png": np.zeros((28, 28, 3), dtype=np.uint8)}, "not an 8-bit grey image"),
        ({"digit-7-a.png": np.zeros((56, 56), dtype=np.uint8)}, "not an 8-bit grey image"),
        ({"digit-7-a.png": np.ones((28, 28), dtype=bool)}, "not an 8-bit grey image"),
        ({f"{digit}/a.png": GREY for digit in range(10)}, "has 1 images of digit 0, at least 10"),
    ],
    ids=["empty", "unnamed", "colour", "size", "black and white", "missing digit"],
)
def test_folder_that_cannot_be_evaluated_gives_the_reason(
    tmp_path: Path, files: dict[str, np.ndarray], reason: str
) -> None:
    for name, pixels in files.items():
        write(tmp_path / name, pixels)
    with pytest.raises(ScriptError, match=reason):
        read_samples(tmp_path)


def test_palette_image_is_rejected(tmp_path: Path) -> None:
    Image.fromarray(GREY).quantize(16).save(tmp_path / "digit-7-a.png")
    with pytest.raises(ScriptError, match="not an 8-bit grey image"):
        read_samples(tmp_path)


def test_error_names_a_file_that_is_not_an_image(tmp_path: Path) -> None:
    (tmp_path / "digit-1-a.png").write_text("one")
    with pytest.raises(ScriptError, match=r"digit-1-a\.png cannot be read"):
        read_samples(tmp_path)


def test_error_names_a_file_with_any_flipped_bit(tmp_path: Path) -> None:
    write(tmp_path / "digit-1-a.png", GREY)
    whole = (tmp_path / "digit-1-a.png").read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "digit-1-a.png").write_bytes(damaged)
        with pytest.raises(ScriptError, match=r"digit-1-a\.png|has 0 images"):
            read_samples(tmp_path)


def test_compared_digits_of_each_split_are_not_training_digits_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_idx_files(tmp_path, num_images=200)
    trust_idx_files(monkeypatch, 200)
    train, _ = split_validation(*load_mnist("train", tmp_path))
    learned_for_features, unlearned = (unique_images(ImageSet(*each)) for each in split_unlearned(*train))
    found = {split: load_references(split, tmp_path) for split in SPLITS}
    for references in found.values():
        assert not unique_images(references.held_out) & unique_images(references.learned)
        assert unique_images(references.real) <= unique_images(references.learned) & unlearned
    for split in ("test", "validation"):
        assert unique_images(found[split].learned) == learned_for_features | unlearned
    halves = [found["training"].real, found["training"].held_out]
    assert unique_images(halves[0]) | unique_images(halves[1]) == unlearned
    assert [each.labels.bincount().tolist() for each in halves] == [[7] * 10] * 2
    assert {split: len(of.held_out.labels) for split, of in found.items()} == {
        "test": 200,
        "validation": NUM_VALIDATION,
        "training": 70,
    }
    of_file = [load_references("training", tmp_path).held_out for _ in range(2)]
    assert torch.equal(of_file[0].images, of_file[1].images)


def test_balanced_takes_equally_many_of_each_digit_or_fails() -> None:
    images = torch.arange(60, dtype=torch.uint8).view(60, 1, 1, 1).expand(60, 1, 28, 28)
    labels = torch.cat([torch.zeros(30), torch.arange(30) % 10]).long()
    chosen = balanced(ImageSet(images, labels), 30)
    assert chosen.labels.tolist() == [*range(10)] * 3
    assert chosen.images[:, 0, 0, 0].tolist() == [0, *range(31, 40), 1, *range(41, 50), 2, *range(51, 60)]
    with pytest.raises(ScriptError, match="3 of one class, but 4 images of each class are needed"):
        balanced(ImageSet(images, labels), 40)


def test_parquet_file_is_read_as_written(tmp_path: Path) -> None:
    digits = bars(1100, 2)  # more than one row group
    write_parquet(tmp_path, rows_of(digits), seed=5)
    read = read_samples(tmp_path)
    assert read.images.equal(digits.images)
    assert read.labels.equal(digits.labels)


def test_unequal_numbers_are_read_and_a_missing_digit_gives_an_error(tmp_path: Path) -> None:
    digits = bars(200, 2)
    for digit, kept in ((4, 10), (7, 0)):
        rows = torch.cat([(digits.labels != digit).nonzero()[:, 0], (digits.labels == digit).nonzero()[:kept, 0]])
        write_parquet(tmp_path, rows_of(digits.rows(rows)), seed=5)
        if kept:
            assert read_samples(tmp_path).labels.bincount().tolist() == [20, 20, 20, 20, 10, 20, 20, 20, 20, 20]
        else:
            with pytest.raises(ScriptError, match="has 0 images of digit 7, at least 10"):
                read_samples(tmp_path)


def test_error_names_a_parquet_row_that_is_not_a_grey_picture(tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.parent.mkdir()
    with io.BytesIO() as buffer:
        Image.fromarray(np.zeros((28, 28, 3), np.uint8)).save(buffer, "PNG")
        colour = buffer.getvalue()
    for content, reason in ((b"seven", "row 1 cannot be read as a PNG"), (colour, "row 1 is not an 8-bit grey image")):
        good = encode_png(Image.fromarray(GREY))
        pq.write_table(pa.table({"image": [{"bytes": good}, {"bytes": content}], "label": [1, 2]}), path)
        with pytest.raises(ScriptError, match=reason):
            read_samples(tmp_path)
