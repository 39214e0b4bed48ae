"""The response formats contain the same images, with their provenance, seed and times."""

import base64
import hashlib
import io
import json
import re
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.service import EVENTS, GIF, PNG, WEBP, ZIP, Service, open_animation, open_png, pngs

BODY = {"digit": 7, "count": 5, "seed": 2**53 - 1, "num_steps": 12, "sampler": "ddim", "guidance_scale": 1.5}
# The 12 timesteps are 100, 92, 83, ..., 17 and 8. Seven of them are within the interval 20 to 80 of guidance.
EVALUATIONS = 12 + 7
TIMES = ("queue_seconds", "denoise_seconds", "total_seconds")


@pytest.fixture(scope="module")
def generated(service: Service) -> dict[str, Any]:
    """Returns the JSON response to BODY."""
    response: dict[str, Any] = service.post(BODY).json()
    return response


@pytest.fixture(scope="module")
def images(generated: dict[str, Any]) -> list[bytes]:
    """Returns the PNG files in that response."""
    return [base64.b64decode(image["png"]) for image in generated["images"]]


def test_json_contains_all_options_and_the_model(generated: dict[str, Any], checkpoint: Path) -> None:
    sha256 = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    fields = {name: value for name, value in generated.items() if name not in ("images", "timing")}
    without_clip = {"clip_guidance_scale": 0.0, "clip_prompt": None, "clip": None, "warning": None}
    model = {"name": "default", "sha256": sha256}
    assert fields == {
        **BODY,
        "label": "7",
        "labels": ["7"] * 5,
        "noise": "unfog",
        "model": model,
        "evaluations": EVALUATIONS,
        **without_clip,
    }
    assert [set(image) for image in generated["images"]] == [{"index", "png"}] * 5
    assert [image["index"] for image in generated["images"]] == [0, 1, 2, 3, 4]


def test_times_in_json_are_consistent(generated: dict[str, Any]) -> None:
    assert set(generated["timing"]) == set(TIMES)
    queue, denoise, total = (generated["timing"][name] for name in TIMES)
    assert queue >= 0
    assert denoise > 0
    assert queue + denoise <= total + 1e-5  # the times are rounded


def test_images_are_28x28_greyscale_and_distinct(images: list[bytes]) -> None:
    for png in images:
        pixels, _, mode = open_png(png)
        assert (pixels.shape, mode) == ((28, 28), "L")
    assert len(set(images)) == 5


def test_every_png_contains_its_provenance(images: list[bytes], checkpoint: Path) -> None:
    for index, png in enumerate(images):
        assert open_png(png)[1] == {
            "Software": f"unfog {version('unfog')}",
            "Digit": "7",
            "Label": "7",
            "Seed": str(2**53 - 1),
            "Index": str(index),
            "Sampler": "ddim",
            "Steps": "12",
            "Guidance-Scale": "1.5",
            "Model-SHA256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        }


def test_png_response_of_one_image_equals_the_png_in_the_json(service: Service, images: list[bytes]) -> None:
    assert service.post({**BODY, "count": 1}, PNG).content == images[0]


def test_png_response_of_several_images_is_a_contact_sheet(service: Service, images: list[bytes]) -> None:
    sheet, chunks, mode = open_png(service.post(BODY, PNG).content)
    assert (sheet.shape, mode) == ((2 * 28, 3 * 28), "L")
    cells = [
        sheet[28 * row : 28 * (row + 1), 28 * column : 28 * (column + 1)] for row in (0, 1) for column in (0, 1, 2)
    ]
    for cell, png in zip(cells, images, strict=False):
        assert (cell == open_png(png)[0]).all()
    assert not cells[5].any()
    assert chunks == {**open_png(images[0])[1], "Index": "0-4"}


@pytest.mark.parametrize(
    ("count", "rows", "columns"), [(2, 1, 2), (3, 2, 2), (4, 2, 2), (9, 3, 3), (10, 3, 4), (13, 4, 4)]
)
def test_contact_sheet_has_ceil_sqrt_count_columns(service: Service, count: int, rows: int, columns: int) -> None:
    response = service.post({"digit": 0, "count": count, "num_steps": 1}, PNG)
    assert open_png(response.content)[0].shape == (28 * rows, 28 * columns)


def test_zip_contains_the_same_files(service: Service, images: list[bytes]) -> None:
    with zipfile.ZipFile(io.BytesIO(service.post(BODY, ZIP).content)) as archive:
        assert archive.testzip() is None
        files = {name: archive.read(name) for name in archive.namelist()}
    assert files == {f"digit-7-seed-{2**53 - 1}-{index}.png": png for index, png in enumerate(images)}


@pytest.mark.parametrize("scale", [2, 5])
def test_scale_repeats_pixels_and_changes_nothing_else(service: Service, images: list[bytes], scale: int) -> None:
    for large, small in zip(pngs(service.post({**BODY, "scale": scale})), images, strict=True):
        (large_pixels, large_chunks, _), (small_pixels, small_chunks, _) = open_png(large), open_png(small)
        assert (large_pixels == small_pixels.repeat(scale, axis=0).repeat(scale, axis=1)).all()
        assert large_chunks == small_chunks


def test_scale_enlarges_the_whole_contact_sheet(service: Service) -> None:
    small, large = (open_png(service.post({**BODY, "scale": scale}, PNG).content)[0] for scale in (1, 3))
    assert (large == small.repeat(3, axis=0).repeat(3, axis=1)).all()


@pytest.mark.parametrize("accept", ["application/json", PNG, ZIP, WEBP, GIF])
def test_headers_contain_the_seed_and_the_server_timing(service: Service, accept: str) -> None:
    response = service.post(BODY, accept)
    assert response.headers["x-seed"] == str(BODY["seed"])
    number = r"\d+(\.\d+)?"
    assert re.fullmatch(
        f"queue;dur={number}, denoise;dur={number}, encode;dur={number}", response.headers["server-timing"]
    )


@pytest.mark.parametrize("accept", [WEBP, GIF])
@pytest.mark.parametrize("count", [1, 5])
def test_animation_shows_x_t_of_the_stream_and_ends_with_the_png(service: Service, accept: str, count: int) -> None:
    body = {**BODY, "count": count}
    response = service.post(body, accept, "?previews=6")
    assert response.headers["content-type"] == accept
    frames = open_animation(response.content)
    with service.events(body, "?previews=6&include=x_t") as stream:
        progress = [data["x_t"] for name, data in stream if name == "progress"]
    assert len(frames) == len(progress) == 6
    for frame, x_t in zip(frames, progress[:-1], strict=False):
        cells = [open_png(base64.b64decode(png))[0] for png in x_t]
        if count == 5:  # the sheet has two rows, and an empty cell
            cells = [np.vstack([np.hstack(cells[:3]), np.hstack([*cells[3:], np.zeros_like(cells[0])])])]
        assert np.array_equal(frame, cells[0])
    assert np.array_equal(frames[-1], open_png(service.post(body, PNG).content)[0])
    assert len(np.unique(frames[0])) > 100  # it begins with noise
    large = open_animation(service.post({**body, "scale": 3}, accept, "?previews=6").content)
    assert all(np.array_equal(one, other.repeat(3, 0).repeat(3, 1)) for one, other in zip(large, frames, strict=True))


def test_seed_header_equals_the_seed_in_the_json(service: Service) -> None:
    response = service.post({"digit": 7, "num_steps": 1})
    assert response.headers["x-seed"] == str(response.json()["seed"])


def test_events_are_in_order_and_contain_the_same_images(service: Service, images: list[bytes]) -> None:
    with service.events({**BODY, "scale": 1}) as stream:
        events = list(stream)
    names = [name for name, _ in events]
    assert re.fullmatch("(accepted )(progress )+(image ){5}(done )", "".join(f"{name} " for name in names))
    accepted, done = events[0][1], events[-1][1]
    assert set(accepted) == {"job", "seed", "position", "eta_seconds"}
    assert (accepted["seed"], accepted["position"]) == (BODY["seed"], 0)
    assert accepted["eta_seconds"] > 0
    assert set(done) == {"label", "digit", "seed", "evaluations", "timing"}
    assert (done["seed"], done["evaluations"]) == (BODY["seed"], EVALUATIONS)
    assert set(done["timing"]) == set(TIMES)
    finished = {data["index"]: base64.b64decode(data["png"]) for name, data in events if name == "image"}
    assert [finished[index] for index in range(5)] == images


@pytest.mark.parametrize(
    ("query", "num_steps", "expected"),
    [("", 100, 10), ("?previews=0", 30, 0), ("?previews=4", 30, 4), ("?previews=100", 100, 100), ("?previews=9", 3, 3)],
)
def test_number_of_previews_is_within_one_of_the_requested_number(
    service: Service, query: str, num_steps: int, expected: int
) -> None:
    with service.events({"digit": 2, "count": 2, "num_steps": num_steps, "scale": 4}, query) as stream:
        progress = [data for name, data in stream if name == "progress"]
    assert abs(len(progress) - expected) <= 1
    steps = [data["step"] for data in progress]
    assert steps == sorted(set(steps))
    for data in progress:
        assert set(data) == {"step", "of", "previews"}
        assert (data["of"], len(data["previews"])) == (num_steps, 2)
        assert 0 < data["step"] <= num_steps
    for preview in (data["previews"][-1] for data in progress):
        pixels, chunks, mode = open_png(base64.b64decode(preview))
        assert (pixels.shape, chunks, mode) == ((28, 28), {}, "L")  # previews are not scaled and have no metadata


def test_last_ddim_preview_equals_the_image(service: Service) -> None:
    """The last step of DDIM returns the predicted x_0."""
    with service.events({"digit": 2, "num_steps": 10, "sampler": "ddim"}, "?previews=10") as stream:
        events = list(stream)
    (image,) = [data["png"] for name, data in events if name == "image"]
    last = [data for name, data in events if name == "progress"][-1]
    assert last["step"] == 10
    assert (open_png(base64.b64decode(last["previews"][0]))[0] == open_png(base64.b64decode(image))[0]).all()


def test_event_stream_has_its_media_type_and_no_store(service: Service) -> None:
    response = service.post({**BODY, "num_steps": 1}, EVENTS)
    assert response.headers["content-type"].partition(";")[0] == EVENTS
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-seed"] == str(BODY["seed"])
    assert json.loads(response.text.split("\n")[1].removeprefix("data: "))["seed"] == BODY["seed"]
