"""Requests with `labels`: in every format, each image equals that of a request for its class alone."""

import base64
import io
import json
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from scripts import sample
from tests.e2e.conftest import start_service
from tests.e2e.service import EVENTS, GIF, PNG, WEBP, ZIP, Service, open_png

WORD = ["3", "1", "1", "4"]
OPTIONS = {"seed": 7, "num_steps": 3, "sampler": "ddim"}


@pytest.fixture(scope="module")
def service(checkpoint: Path) -> Iterator[Service]:
    with ExitStack() as stack:
        yield start_service(stack, checkpoint, UNFOG_MAX_COUNT="40")


def ask(service: Service, accept: str = "application/json", **fields: Any) -> httpx.Response:
    return service.client.post("/generate", json={**OPTIONS, **fields}, headers={"Accept": accept})


def alone(service: Service, label: str, index: int) -> np.ndarray:
    """Returns image `index` of a request for one class."""
    answer = ask(service, label=label, count=index + 1).json()
    return pixels_of(base64.b64decode(answer["images"][index]["png"]))


def pixels_of(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def expected(service: Service) -> list[np.ndarray]:
    return [alone(service, label, index) for index, label in enumerate(WORD)]


def test_each_image_is_that_of_a_request_for_its_class(service: Service, expected: list[np.ndarray]) -> None:
    answer = ask(service, labels=WORD).json()
    pngs = [base64.b64decode(image["png"]) for image in answer["images"]]
    assert [open_png(png)[1]["Label"] for png in pngs] == WORD
    assert [open_png(png)[1]["Index"] for png in pngs] == ["0", "1", "2", "3"]
    for png, image in zip(pngs, expected, strict=True):
        assert np.array_equal(pixels_of(png), image)
    assert (answer["labels"], answer["label"], answer["digit"], answer["count"]) == (WORD, None, None, 4)


def test_answer_for_one_class_lists_it_for_each_image(service: Service) -> None:
    answer = ask(service, digit=3, count=2).json()
    assert (answer["label"], answer["labels"]) == ("3", ["3", "3"])
    answer = ask(service, labels=[3, "3"]).json()
    assert (answer["label"], answer["digit"], answer["labels"]) == ("3", 3, ["3", "3"])


def test_sheet_has_the_images_in_one_row(service: Service, expected: list[np.ndarray]) -> None:
    data = ask(service, PNG, labels=WORD).content
    assert np.array_equal(pixels_of(data), np.concatenate(expected, axis=1))
    info = open_png(data)[1]
    assert (json.loads(info["Label"]), info["Layout"], info["Index"]) == (WORD, "rows", "0-3")
    assert "Digit" not in info


def test_long_sheet_has_rows_of_16_images(service: Service) -> None:
    data = ask(service, PNG, labels=[0] * 17 + [5]).content
    assert pixels_of(data).shape == (2 * 28, 16 * 28)
    assert np.array_equal(pixels_of(data)[28:, 28:56], alone(service, "5", 17))


def test_archive_has_a_file_of_each_image_with_its_class(service: Service, expected: list[np.ndarray]) -> None:
    with zipfile.ZipFile(io.BytesIO(ask(service, ZIP, labels=WORD).content)) as archive:
        assert archive.namelist() == [f"digit-{label}-seed-7-{index}.png" for index, label in enumerate(WORD)]
        for name, image in zip(archive.namelist(), expected, strict=True):
            assert np.array_equal(pixels_of(archive.read(name)), image)


def test_stream_has_the_images_and_ends_with_their_classes(service: Service, expected: list[np.ndarray]) -> None:
    events = [line[6:] for line in ask(service, EVENTS, labels=WORD).text.splitlines() if line.startswith("data: ")]
    images = [each for each in map(json.loads, events) if "png" in each]
    for image in images:
        data = base64.b64decode(image["png"])
        assert np.array_equal(pixels_of(data), expected[image["index"]])
        assert open_png(data)[1]["Label"] == WORD[image["index"]]
    done = json.loads(events[-1])
    assert len(images) == 4 and done["labels"] == WORD and "label" not in done


@pytest.mark.parametrize("kind", [WEBP, GIF])
def test_animation_ends_with_the_row(service: Service, expected: list[np.ndarray], kind: str) -> None:
    headers = {"Accept": kind}
    answer = service.client.post("/generate?previews=2", json={**OPTIONS, "labels": WORD}, headers=headers)
    with Image.open(io.BytesIO(answer.content)) as animation:
        assert animation.size == (4 * 28, 28)
        animation.seek(animation.n_frames - 1)
        last = np.asarray(animation.convert("L")).astype(int)
    assert abs(last - np.concatenate(expected, axis=1)).max() <= (0 if kind == WEBP else 8)


@pytest.mark.parametrize("labels", [WORD, [6]])
def test_sheet_is_reproduced_by_the_service_and_by_the_script(
    service: Service, checkpoint: Path, tmp_path: Path, labels: list[str]
) -> None:
    data = ask(service, PNG, labels=labels, scale=3).content
    answer = service.client.post("/reproduce", files={"image": ("word.png", data)})
    assert answer.json()["identical"] is True
    (tmp_path / "word.png").write_bytes(data)
    again = tmp_path / "again.png"
    given = [f"--like={tmp_path / 'word.png'}", f"--checkpoint={checkpoint}", "--compile=off", f"--out={again}"]
    sample.main(given)  # exits with status 1 if a pixel differs
    assert open_png(again.read_bytes())[1] == open_png(data)[1]


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"labels": [], "seed": 1}, "labels", "at least 1 item"),
        ({"labels": [1, "eleven"]}, "labels", "Unknown label 'eleven'"),
        ({"labels": [1, 12]}, "labels", "Unknown label 12"),
        ({"labels": [1, None]}, "labels", "name or the number of a class"),
        ({"labels": "31"}, "labels", "valid list"),
        ({"labels": [1], "label": "1"}, "label", "This field cannot be combined with labels"),
        ({"labels": [1], "digit": 1}, "digit", "This field cannot be combined with labels"),
        ({"labels": [1], "count": 1}, "count", "This field cannot be combined with labels"),
        ({"labels": [1], "clip_guidance_scale": 2}, "labels", "CLIP guidance has one prompt for all images"),
        ({"labels": [1] * 41}, "labels", "at most 40 items"),
    ],
    ids=str,
)
def test_labels_that_cannot_be_used_are_refused(
    service: Service, fields: dict[str, Any], field: str, message: str
) -> None:
    answer = ask(service, **fields)
    assert answer.status_code == 422
    (error,) = answer.json()["errors"]
    assert error["loc"][1] == field
    assert message in error["msg"]
