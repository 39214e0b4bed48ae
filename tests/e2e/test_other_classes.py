"""Serves colour images of 20 named classes and digits together, and tests every protocol, format and task."""

import base64
import io
import json
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from model.checkpoint import CheckpointConfig, save
from model.schedule import ScheduleConfig
from tests.e2e.conftest import GUIDANCE, start_service
from tests.e2e.service import PNG, WEBP, ZIP, Service, open_png
from tests.tiny import tiny_unet

NAMES = (
    *("apple", "bear", "bicycle", "bridge", "bus", "butterfly", "camel", "castle", "chair", "clock"),
    *("cup", "dolphin", "fire truck", "forest", "fox", "house", "lion", "motorcycle", "truck", "caf\xe9"),
)
TRUCK = {"model": "objects", "label": "truck", "num_steps": 4, "seed": 5}


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = tiny_unet(seed=4, image_size=32, image_channels=3, num_classes=20)
    for parameter in network.parameters():
        parameter.mul_(0.6)  # With larger weights, all pixels are clipped.
    path = tmp_path_factory.mktemp("objects") / "objects.safetensors"
    config = CheckpointConfig(
        network.config, ScheduleConfig(), class_names=NAMES, guidance=GUIDANCE, training={"label_drop": 0.1}
    )
    save(path, network, config)
    return path


@pytest.fixture(scope="module")
def mixed(checkpoint: Path, objects: Path) -> Iterator[Service]:
    """Returns a service with two models. The default model generates digits, and the other one generates objects."""
    with ExitStack() as stack:
        yield start_service(stack, checkpoint, UNFOG_MODELS=f"digits={checkpoint},objects={objects}")


def colour(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


def photo(height: int, width: int, seed: int = 0) -> bytes:
    """Returns a smooth picture in colour."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def ask(service: Service, path: str, **body: Any) -> dict[str, Any]:
    response = service.client.post(path, json={"model": "objects", **body})
    assert response.status_code == 200, response.text
    return response.json()


def in_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def test_models_are_listed_with_their_classes_and_shapes(mixed: Service) -> None:
    digits, objects = mixed.client.get("/models").json()["models"]
    assert (digits["name"], digits["class_names"]) == ("digits", list("0123456789"))
    assert (objects["name"], objects["class_names"], objects["image_shape"]) == ("objects", list(NAMES), [3, 32, 32])
    assert (digits["normalises_drawings"], objects["normalises_drawings"]) == (True, False)
    assert objects["has_picture_tasks"]
    assert [model["id"] for model in mixed.client.get("/v1/models").json()["data"]] == ["digits", "objects"]


def test_request_without_a_model_uses_the_first_one(mixed: Service) -> None:
    answer = mixed.client.post("/generate", json={"digit": 3, "num_steps": 2}).json()
    assert (answer["model"]["name"], answer["digit"], answer["label"]) == ("digits", 3, "3")


@pytest.mark.parametrize("label", ["truck", "TRUCK", 18, "18"])
def test_class_is_asked_for_by_name_or_number(mixed: Service, label: str | int) -> None:
    answer = ask(mixed, "/generate", **{**TRUCK, "label": label})
    assert (answer["label"], answer["digit"]) == ("truck", None)
    (image,) = answer["images"]
    pixels, text, _ = open_png(base64.b64decode(image["png"]))
    assert pixels.shape == (32, 32, 3)
    assert text["Label"] == "truck"
    assert "Digit" not in text
    assert image["png"] == ask(mixed, "/generate", **TRUCK)["images"][0]["png"]


def test_every_format_is_in_colour(mixed: Service) -> None:
    body = {**TRUCK, "count": 3, "scale": 2}
    expected = [colour(base64.b64decode(image["png"])) for image in ask(mixed, "/generate", **body)["images"]]
    assert [image.shape for image in expected] == [(64, 64, 3)] * 3
    sheet = colour(mixed.post(body, PNG).content)
    assert sheet.shape == (128, 128, 3)
    assert np.array_equal(sheet[:64, 64:], expected[1])
    with zipfile.ZipFile(io.BytesIO(mixed.post(body, ZIP).content)) as archive:
        assert archive.namelist() == [f"truck-seed-5-{index}.png" for index in range(3)]
        assert np.array_equal(colour(archive.read("truck-seed-5-2.png")), expected[2])
    with Image.open(io.BytesIO(mixed.post(body, WEBP).content)) as animation:
        animation.seek(animation.n_frames - 1)  # type: ignore[attr-defined] # of animations
        assert np.array_equal(np.asarray(animation.convert("RGB")), sheet)
    with mixed.events(body, "?previews=2&include=x_t") as events:
        found = list(events)
    for preview in next(data for name, data in found if name == "progress")["x_t"]:
        assert colour(base64.b64decode(preview)).shape == (32, 32, 3)
    images = {data["index"]: data["png"] for name, data in found if name == "image"}
    assert all(np.array_equal(colour(base64.b64decode(images[index])), expected[index]) for index in range(3))


def test_name_that_is_not_ascii_is_kept_in_answers_and_escaped_in_files(mixed: Service) -> None:
    answer = ask(mixed, "/generate", **{**TRUCK, "label": NAMES[-1]})
    assert answer["label"] == NAMES[-1]
    png = base64.b64decode(answer["images"][0]["png"])
    assert open_png(png)[1]["Label"] == '"caf\\u00e9"'
    assert ask_without_model(mixed, "/reproduce", image=in_base64(png))["identical"]


def ask_without_model(service: Service, path: str, **body: Any) -> dict[str, Any]:
    response = service.client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("count", [1, 3])
def test_picture_of_another_class_is_reproduced(mixed: Service, count: int) -> None:
    png = mixed.post({**TRUCK, "count": count, "scale": 3}, PNG).content
    answer = ask_without_model(mixed, "/reproduce", image=in_base64(png))
    assert (answer["identical"], answer["label"], answer["model"]["name"]) == (True, "truck", "objects")


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        ({"label": "trukc"}, "label", "Unknown label 'trukc'. Did you mean 'truck'? GET /models lists all 20 names"),
        ({"label": 20}, "label", "Unknown label 20: the model 'objects' has the labels 0 to 19"),
        ({"digit": 3}, "digit", "The classes of model 'objects' are not digits. Send label"),
        ({"label": "fox", "digit": 3}, "label", "Send either label or digit, not both"),
        ({}, "label", "Field required"),
        ({"label": "fox", "scale": 17}, "scale", "Input should be less than or equal to 16"),
    ],
)
def test_class_that_is_missing_or_unknown_is_422(
    mixed: Service, body: dict[str, Any], field: str, message: str
) -> None:
    response = mixed.client.post("/generate", json={"model": "objects", **body})
    assert response.status_code == 422
    (error,) = response.json()["errors"]
    assert error["loc"] == ["body", field]
    assert error["msg"].startswith(message)
    assert message.split(":")[0] in response.json()["detail"]


def test_prompt_of_the_openai_api_names_a_class(mixed: Service) -> None:
    body = {"model": "objects", "prompt": "A red Truck, please", "size": "64x64", "seed": 5}
    (image,) = ask_without_model(mixed, "/v1/images/generations", **body)["data"]
    assert image["revised_prompt"] == "A photo of a truck"
    png = base64.b64decode(image["b64_json"])
    assert colour(png).shape == (64, 64, 3)
    assert open_png(png)[1]["Label"] == "truck"
    edit = {**body, "image": in_base64(photo(50, 70)), "prompt": "a fire truck"}
    (edited,) = ask_without_model(mixed, "/v1/images/edits", **edit)["data"]
    assert open_png(base64.b64decode(edited["b64_json"]))[1]["Label"] == "fire truck"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a trukc", "The prompt names no class. Did you mean 'truck'?"),
        ("a fox and a lion", "The prompt names several classes: fox, lion"),
    ],
)
def test_prompt_that_names_not_exactly_one_class_is_refused(mixed: Service, prompt: str, message: str) -> None:
    response = mixed.client.post("/v1/images/generations", json={"model": "objects", "prompt": prompt})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")
    assert message in response.json()["error"]["message"]


def test_open_inference_has_the_input_label_and_the_shape_of_the_model(mixed: Service) -> None:
    metadata = mixed.client.get("/v2/models/objects").json()
    assert metadata["inputs"][0]["name"] == "label"
    assert metadata["outputs"][0]["shape"] == [-1, 32, 32, 3]
    assert mixed.client.get("/v2/models/digits").json()["inputs"][0]["name"] == "digit"
    inputs = [
        {"name": "label", "datatype": "INT64", "shape": [2], "data": [18, 0]},
        {"name": "seed", "datatype": "INT64", "shape": [2], "data": [5, 6]},
    ]
    body = {"inputs": inputs, "parameters": {"num_steps": 4}}
    answer = ask_without_model(mixed, "/v2/models/objects/infer", **body)
    (image,) = [output for output in answer["outputs"] if output["name"] == "image"]
    pixels = np.array(image["data"], np.uint8).reshape(image["shape"])
    assert pixels.shape == (2, 32, 32, 3)
    assert np.array_equal(pixels[0], colour(base64.b64decode(ask(mixed, "/generate", **TRUCK)["images"][0]["png"])))
    refused = mixed.client.post("/v2/models/objects/infer", json={"inputs": [{**inputs[0], "name": "digit"}]})
    assert refused.status_code == 400
    assert "label" in refused.json()["error"]


def test_photo_is_recognised_among_the_named_classes(mixed: Service) -> None:
    answer = ask(mixed, "/recognize", image=in_base64(photo(60, 90)), num_pairs=3)
    assert len(answer["probabilities"]) == 20
    assert answer["label"] == NAMES[int(np.argmax(answer["probabilities"]))]
    assert (answer["digit"], answer["is_digit"], answer["fit"], answer["invert"]) == (None, None, "resize", False)
    body = {"model": "objects", "image": in_base64(photo(60, 90)), "num_pairs": 3}
    chart = mixed.client.post("/recognize", json=body, headers={"Accept": PNG})
    assert open_png(chart.content)[1]["Task"] == "recognize"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/edit", {"strength": 0.5}),
        ("/edit", {"strength": 0.5, "label": "fox"}),
        ("/denoise", {"mode": "mean"}),
        ("/denoise", {"num_steps": 4}),
        ("/denoise", {"noise_std": 40, "label": 3}),
        ("/inpaint", {"num_steps": 2}),
        ("/inpaint", {"num_steps": 2, "label": "lion"}),
    ],
)
def test_picture_tasks_answer_in_colour_and_in_the_size_of_the_model(
    mixed: Service, path: str, body: dict[str, Any]
) -> None:
    picture = photo(48, 80, seed=1)
    if path == "/inpaint":
        mask = np.zeros((48, 80), np.uint8)
        mask[:, 40:] = 255
        buffer = io.BytesIO()
        Image.fromarray(mask).save(buffer, "PNG")
        body = {**body, "mask": in_base64(buffer.getvalue())}
    answer = ask(mixed, path, image=in_base64(picture), seed=2, **body)
    pixels = colour(base64.b64decode(answer["images"][0]["png"]))
    assert pixels.shape == (32, 32, 3)
    if "label" in body:
        assert answer["label"] == (body["label"] if isinstance(body["label"], str) else NAMES[body["label"]])
    if path == "/inpaint":  # The left half is that of the central square of the picture.
        with Image.open(io.BytesIO(picture)) as opened:
            expected = np.asarray(opened.crop((16, 0, 64, 48)).resize((32, 32), Image.Resampling.BILINEAR))
        assert np.abs(pixels[:, :14].astype(int) - expected[:, :14]).max() <= 8


def test_image_of_the_model_keeps_its_pixels(mixed: Service) -> None:
    png = base64.b64decode(ask(mixed, "/generate", **TRUCK)["images"][0]["png"])
    enlarged = base64.b64decode(ask(mixed, "/generate", **TRUCK, scale=5)["images"][0]["png"])
    for picture in (png, enlarged):
        answer = ask(mixed, "/edit", image=in_base64(picture), strength=0, label="fox", seed=1)
        assert np.array_equal(colour(base64.b64decode(answer["images"][0]["png"])), colour(png))


def test_normalisation_of_handwriting_is_refused_for_other_models(mixed: Service) -> None:
    response = mixed.client.post("/edit", json={"model": "objects", "image": in_base64(photo(40, 40)), "fit": "digit"})
    assert response.status_code == 422
    assert response.json()["errors"] == [
        {"loc": ["body", "fit"], "msg": "Input should be 'auto' or 'resize' for model 'objects'"}
    ]


def test_label_in_a_form_is_a_text(mixed: Service) -> None:
    data = {"model": "objects", "label": "18", "strength": "0.4", "seed": "1"}
    response = mixed.client.post("/edit", data=data, files={"image": photo(40, 40)})
    assert response.json()["label"] == "truck"


def test_images_are_the_same_alone_and_beside_those_of_the_other_model(mixed: Service) -> None:
    bodies = [TRUCK, {**TRUCK, "label": "fox", "count": 2}, {"digit": 4, "seed": 1, "num_steps": 12, "count": 3}]
    alone = [mixed.images(**body) for body in bodies]
    with ThreadPoolExecutor() as pool:
        others = [
            pool.submit(mixed.images, **{**body, "count": 8, "seed": seed, "num_steps": 20})
            for seed in range(3)
            for body in bodies
        ]
        assert list(pool.map(lambda body: mixed.images(**body), bodies * 3)) == alone * 3
        assert all(len(other.result()) == 8 for other in others)


def test_images_are_counted_by_the_name_of_their_class(mixed: Service) -> None:
    before = mixed.metrics()
    mixed.images(**{**TRUCK, "count": 2})
    after = mixed.metrics()
    labels = {"digit": "none", "label": "truck"}
    assert after.value("images_total", **labels) - before.value("images_total", **labels) == 2


def test_document_of_the_api_permits_exactly_the_names(mixed: Service) -> None:
    document = mixed.client.get("/openapi.json").json()
    text = json.dumps(document["components"]["schemas"]["GenerateRequest"], ensure_ascii=False)
    assert all(f'"{name}"' in text for name in NAMES)
    model = document["components"]["schemas"]["GenerateRequest"]["properties"]["model"]
    assert model["enum"] == ["digits", "objects"]


@pytest.mark.parametrize("path", ["/recognize", "/denoise", "/edit"])
def test_picture_without_colour_is_accepted(mixed: Service, path: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 50), dtype=np.uint8)).save(buffer, "PNG")
    response: httpx.Response = mixed.client.post(path, json={"model": "objects", "image": in_base64(buffer.getvalue())})
    assert response.status_code == 200, response.text
