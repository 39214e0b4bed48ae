import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.prepared_image import central_square
from scripts.common.data.data_set import DataSet, ImageSet
from scripts.common.data.first_look import lines_about
from tests.scripts.common.data.samples import (
    COUNTS,
    NAMES,
    SIZE,
    encoded,
    load,
    message,
    pictures,
    pixels_of,
    write_folder,
    write_idx,
    write_npz,
    write_parquet,
    write_zip,
)

WRITERS: dict[str, Callable[[Path], Path]] = {
    "folder": lambda path: write_folder(path / "data", splits=True),
    "zip": lambda path: write_zip(path / "data.zip"),
    "zip in a folder": lambda path: write_zip(path / "data.zip", top="animals/"),
    "npz": lambda path: write_npz(path / "data.npz"),
    "parquet": lambda path: write_parquet(path / "data"),
}


@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_gives_the_same_images_labels_and_names(tmp_path: Path, layout: str) -> None:
    if layout == "parquet":
        pytest.importorskip("pyarrow")
    data = load(WRITERS[layout](tmp_path))
    assert data.class_names == NAMES
    assert data.image_shape == (3, SIZE, SIZE)
    assert data.validate is data.test
    for split, images in (("train", data.learn), ("test", data.test)):
        expected = {(label, pixels.tobytes()) for label, _, pixels in pictures(split)}
        found = zip(images.labels.tolist(), images.images.permute(0, 2, 3, 1).numpy(), strict=True)
        assert {(label, np.ascontiguousarray(image).tobytes()) for label, image in found} == expected
        assert len(images) == 3 * COUNTS[split]


def test_idx_files_give_grey_images_and_numbers_as_names(tmp_path: Path) -> None:
    data = load(write_idx(tmp_path / "data"))
    assert data.class_names == ("0", "1", "2")
    assert data.image_shape == (1, SIZE, SIZE)
    assert np.array_equal(data.learn.images[0, 0].numpy(), pixels_of(0, 0, grey=True))


def test_tenth_of_each_class_is_held_out_if_there_are_no_test_images(tmp_path: Path) -> None:
    data = load(write_folder(tmp_path / "data"))
    assert data.validate.labels.bincount().tolist() == [1, 1, 1]
    assert data.learn.labels.bincount().tolist() == [7, 7, 7]
    again = load(tmp_path / "data")
    assert torch.equal(again.validate.images, data.validate.images)
    assert again.digest == data.digest


def test_grey_pictures_stay_grey_and_one_colour_picture_makes_all_images_colour(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data", grey=True)
    assert load(root).image_shape == (1, SIZE, SIZE)
    (root / "cat" / "0.png").write_bytes(encoded(pixels_of(0, 0)))
    assert load(root).image_shape == (3, SIZE, SIZE)


def test_pictures_of_several_sizes_are_cropped_and_resized_as_the_service_does(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data")
    photo = np.random.default_rng(1).integers(0, 256, (90, 50, 3), dtype=np.uint8)
    (root / "cat" / "0.png").write_bytes(encoded(photo))
    data = load(root)
    assert data.image_shape == (3, 32, 32)
    every = torch.cat([data.learn.images, data.validate.images])
    expected = central_square(photo, 32).pixels
    assert any(torch.equal(image, expected) for image in every)
    assert load(root, image_size=16).image_shape == (3, 16, 16)


def test_data_folder_stays_unchanged(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    load(root)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_names_are_kept_as_they_are_written(tmp_path: Path) -> None:
    for name in ("Ölgötze", "犬", "red fox"):
        for number in range(2):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{number}.png").write_bytes(encoded(pixels_of(0, number)))
    assert load(tmp_path).class_names == ("red fox", "Ölgötze", "犬")


def test_hidden_files_and_other_files_are_ignored(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data")
    (root / "cat" / ".DS_Store").write_bytes(b"x")
    (root / "cat" / "notes.txt").write_bytes(b"x")
    data = load(root)
    assert list(data.ignored) == ["cat/notes.txt"]
    assert len(data.learn) + len(data.validate) == 24


def broken(root: Path, content: bytes) -> Path:
    (root / "cat" / "0.png").write_bytes(content)
    return root


def animated(root: Path) -> Path:
    frames = [Image.fromarray(pixels_of(0, number)) for number in range(2)]
    frames[0].save(root / "cat" / "0.gif", save_all=True, append_images=frames[1:])
    return root


def linked(root: Path) -> Path:
    outside = root.parent / "secret.png"
    outside.write_bytes(encoded(pixels_of(0, 0)))
    (root / "cat" / "link.png").symlink_to(outside)
    return root


def linked_folder(root: Path) -> Path:
    (root.parent / "other").mkdir()
    (root / "eel").symlink_to(root.parent / "other")
    return root


def lone(root: Path) -> Path:
    (root / "eel").mkdir()
    (root / "eel" / "0.png").write_bytes(encoded(pixels_of(0, 0)))
    return root


def same_in_another_case(root: Path) -> Path:
    (root / "CAT").mkdir()
    (root / "CAT" / "0.png").write_bytes(encoded(pixels_of(0, 0)))
    return root


def named(name: str) -> Callable[[Path], Path]:
    def rename(root: Path) -> Path:
        (root / "cat").rename(root / name)
        return root

    return rename


def loose(root: Path) -> Path:
    (root / "x.png").write_bytes(encoded(pixels_of(0, 0)))
    return root


def huge(root: Path) -> Path:
    return broken(root, encoded(np.zeros((1, 5000), np.uint8)))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda root: broken(root, b""), r"data/cat/0\.png: The file is empty\. Remove or replace this picture"),
        (lambda root: broken(root, encoded(pixels_of(0, 0))[:-30]), r"data/cat/0\.png: .*damaged"),
        (
            lambda root: broken(root, b"GIF"),
            r"data/cat/0\.png: .* is not a PNG, .*\. Convert it to one of these formats$",
        ),
        (huge, r"cat/0\.png: .* has 5000 x 1 pixels\. At most 4096 x 4096 are permitted\. Make it smaller$"),
        (animated, r"data/cat/0\.gif: The picture is animated\. Remove or replace this picture"),
        (linked, r"data/cat/link\.png is a link to a file outside "),
        (linked_folder, r"data/eel is a link to a folder"),
        (lone, r"data: the class 'eel' has only one image\. It needs at least two"),
        (same_in_another_case, r"the classes 'CAT' and 'cat' differ only in case\. Rename one of them"),
        (named("a" * 101), r"the class 'a+' needs a name of 1 to \d+ printable characters\. Rename it"),
        (named("a\nb"), r"the class 'a\\nb' needs a name"),
        (named(" "), r"the class ' ' needs a name"),
        (named(os.fsdecode(b"caf\xe9")), r"the class 'caf\\udce9' needs a name of 1 to 100 printable characters"),
        (loose, r"the picture x\.png is not in the folder of a class\. Put the pictures of each class into a folder"),
    ],
)
def test_bad_folder_is_refused_with_a_sentence_that_names_the_file(
    tmp_path: Path, change: Callable[[Path], Path], expected: str
) -> None:
    text = message(change(write_folder(tmp_path / "data")))
    assert re.search(expected, text), text


def test_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("x")
    assert "has no PNG, JPEG, WebP or GIF files, only other files, such as readme.txt" in message(tmp_path)
    assert "does not exist" in message(tmp_path / "none")


def test_test_class_without_training_images_is_refused(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data", splits=True)
    (root / "test" / "eel").mkdir()
    (root / "test" / "eel" / "0.png").write_bytes(encoded(pixels_of(0, 0)))
    assert "the class 'eel' of test/eel/0.png (test) has no pictures for training" in message(root)


def test_two_thousand_classes_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", train_images=np.zeros((2000, 8, 8), np.uint8), train_labels=np.arange(2000))
    assert "the labels are 0 to 1999. They must be 0 to at most 999" in message(tmp_path / "x.npz")


def test_archive_that_is_damaged_or_no_archive_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "data.zip")
    content = bytearray(path.read_bytes())
    content[60] ^= 1
    path.write_bytes(content)
    assert "data.zip/train/cat/0.png cannot be read" in message(path)
    path.write_bytes(b"no archive")
    assert "is not a zip file, or is damaged" in message(path)


def test_zip_bomb_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cat/0.png", bytes(80 * 2**20))
    assert "bomb.zip/cat/0.png is 80 MiB large. The limit is 64 MiB" in message(path)


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"train_images": np.zeros((4, 8, 8), np.uint8)}, "the images have no labels"),
        (
            {"train_images": np.zeros((4, 8, 8), np.uint8), "train_labels": np.zeros((4, 14), np.int64)},
            "an image has 14 labels. Training needs one label for each image",
        ),
        (
            {"train_images": np.zeros((4, 8, 8), np.float32), "train_labels": np.zeros(4, np.int64)},
            "the images have the type float32",
        ),
        (
            {"train_images": np.zeros((4, 8, 8), np.uint8), "train_labels": np.zeros(3, np.int64)},
            "4 images and 3 labels",
        ),
        (
            {"train_images": np.zeros((4, 0, 0), np.uint8), "train_labels": np.zeros(4, np.int64)},
            "the images have the type uint8 and the shape (4, 0, 0). They must be uint8 of the shape (N, H, W)",
        ),
        (
            {"train_images": np.zeros((0, 8, 8), np.uint8), "train_labels": np.zeros(0, np.int64)},
            "data.npz has no pictures. Add at least two of each class",
        ),
        (
            {
                "train_images": np.zeros((4, 8, 8), np.uint8),
                "train_labels": np.arange(4) % 2,
                "class_names": np.array(["cat", "cat"]),
            },
            "the classes 'cat' and 'cat' have the same name. Rename one of them",
        ),
        (
            {
                "train_images": np.zeros((4, 8, 8), np.uint8),
                "train_labels": np.zeros(4, np.int64),
                "class_names": np.array("cat"),
            },
            "class_names has the shape (). It must be an array with one name per class",
        ),
        ({"images": np.zeros((4, 8, 8), np.uint8)}, "has no array 'train_images'. Its arrays are images"),
        ({"train_images": np.array([{}], object)}, "It contains Python objects, which can run code"),
    ],
)
def test_bad_npz_file_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray], expected: str) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    assert expected in message(tmp_path / "data.npz")


def test_pickle_is_refused_without_reading_it(tmp_path: Path) -> None:
    (tmp_path / "data.pkl").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert "can contain Python objects, which run code when they are read" in message(tmp_path / "data.pkl")


def test_limit_keeps_the_first_training_images_and_all_validation_and_test_images() -> None:
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    learn = ImageSet(images, torch.tensor([2, 0, 0, 2, 2, 0, 1, 0, 2, 2]))
    data = DataSet("x", ("a", "b", "c"), learn, learn, learn, known_as="the data")
    limited = data.limited(2)
    assert limited.learn.images.flatten().tolist() == [0, 1, 2, 3, 6]
    assert limited.learn.labels.tolist() == [2, 0, 0, 2, 1]
    assert limited.validate is limited.test is learn
    assert limited.description == "the data, at most 2 of each class"


def test_first_look_warns_about_test_images_that_are_training_images() -> None:
    images = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 1, 8, 8)
    learn, validate, test = (ImageSet(images[rows], torch.zeros(2).long()) for rows in ([0, 1], [2, 3], [1, 4]))
    (warning,) = (line for line in lines_about(DataSet("x", ("cup",), learn, validate, test)) if "also among" in line)
    assert warning == "warning: 1 of 2 test images are also among the training images"


@pytest.mark.parametrize(("names", "side", "expected"), [("01", 28, True), ("01", 32, False), ("ab", 28, False)])
def test_first_look_says_that_numbered_classes_are_taken_for_digits(names: str, side: int, expected: bool) -> None:
    images = ImageSet(torch.zeros(2, 1, side, side, dtype=torch.uint8), torch.arange(2))
    lines = "\n".join(lines_about(DataSet("x", tuple(names), images, images, images)))
    assert ("takes grey images of 28x28 pixels with these names for handwritten digits" in lines) is expected


def test_several_bad_pictures_are_counted_in_one_error(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data")
    (root / "dog" / "0.png").write_bytes(b"")
    assert message(root).endswith("dog/0.png: The file is empty. Remove or replace this picture")
    (root / "dog" / "1.png").write_bytes(encoded(pixels_of(0, 0))[:-30])
    (root / "owl" / "2.png").write_bytes(b"x")
    assert message(root).endswith(
        "dog/0.png: The file is empty. Remove or replace this picture. 2 other pictures cannot be used either"
    )


@pytest.mark.parametrize("each", [1, 3, 4, 8])
def test_a_quarter_of_the_smallest_class_is_left_out_of_each_class(each: int) -> None:
    labels = torch.cat([torch.arange(3).repeat(each), torch.zeros(5, dtype=torch.int64)])
    images = torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None]
    everything = ImageSet(images, labels)
    learned, left_out = DataSet("x", ("a", "b", "c"), everything, everything, everything).split_unlearned()
    assert left_out.labels.bincount(minlength=3).tolist() == [each // 4] * 3
    assert sorted(torch.cat([learned.images, left_out.images]).flatten().tolist()) == images.flatten().tolist()
