"""A pipeline of diffusers in a running service: its images in every format and protocol, and starts that fail."""

import base64
import io
import json
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from tests.e2e.conftest import start_service
from tests.e2e.process import Process
from tests.e2e.service import PNG, ZIP, Service, assert_invalid, open_png, pngs
from tests.pipelines import write_pipeline

with warnings.catch_warnings():  # the dependencies of diffusers raise warnings
    warnings.simplefilter("ignore")
    from diffusers import DDPMScheduler

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of diffusers
SEED, NUM_STEPS = 7, 10
PLAIN = {"seed": SEED, "num_steps": NUM_STEPS, "noise": "torch"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    """A pipeline without classes, as diffusers runs it."""
    return write_pipeline(folder / "plain", DDPMScheduler(clip_sample=False, prediction_type="v_prediction"))


@pytest.fixture(scope="module")
def service(folder: Path, plain: Any) -> Iterator[Service]:
    write_pipeline(folder / "classes", DDPMScheduler(), num_classes=4)
    index = folder / "classes/model_index.json"
    names = {"id2label": {"0": "cat", "1": "dog", "2": "sea star", "3": "none"}}
    index.write_text(json.dumps(json.loads(index.read_text()) | names))
    models = f"plain={folder / 'plain'},classes={folder / 'classes'}"
    with ExitStack() as stack:
        yield start_service(stack, folder, UNFOG_MODELS=models, UNFOG_NULL_LABELS="classes=3")


@pytest.fixture(scope="module")
def expected(plain: Any) -> np.ndarray[Any, Any]:
    """The images of diffusers for the seeds SEED, SEED + 1 and SEED + 2, (3, H, W, C)."""
    generators = [torch.Generator("cpu").manual_seed(SEED + index) for index in range(3)]
    images = plain(3, generator=generators, num_inference_steps=NUM_STEPS, output_type="np").images
    return (255 * images).round()


def differ(images: list[Any], expected: Any) -> float:
    return float((np.stack(images) != expected).mean())


def test_images_of_every_format_are_those_of_diffusers(service: Service, expected: Any) -> None:
    body = {**PLAIN, "count": 3}
    assert differ([open_png(png)[0] for png in pngs(service.post(body))], expected) < 0.001
    with zipfile.ZipFile(io.BytesIO(service.post(body, ZIP).content)) as archive:
        names = [name for name in archive.namelist() if name.endswith(".png")]
        assert differ([open_png(archive.read(name))[0] for name in names], expected) < 0.001
    sheet, *_ = open_png(service.post(body, PNG).content)
    assert differ([sheet[:16, :16], sheet[:16, 16:], sheet[16:, :16]], expected) < 0.001
    with Image.open(io.BytesIO(service.post(body, "image/webp").content)) as animation:
        assert animation.n_frames > 1
    with service.events(body, "?previews=3") as events:
        kinds = list(events)
    images = [open_png(base64.b64decode(data["png"]))[0] for kind, data in kinds if kind == "image"]
    assert differ(images, expected) < 0.001
    assert sum(kind == "progress" for kind, _ in kinds) > 0


def test_picture_is_generated_again_with_the_same_pixels(service: Service) -> None:
    for body in ({**PLAIN, "count": 3}, {**PLAIN, "count": 3, "noise": "unfog", "sampler": "euler"}):
        png = service.post(body, PNG).content
        assert open_png(png)[1].get("Noise") == (None if body["noise"] == "unfog" else "torch")
        response = service.client.post("/reproduce", files={"image": png})
        assert (response.json()["identical"], response.json()["noise"]) == (True, body["noise"])


def test_classes_have_the_names_of_the_folder_and_the_null_label_permits_guidance(service: Service) -> None:
    models = {model["name"]: model for model in service.client.get("/models").json()["models"]}
    assert models["classes"]["class_names"] == ["cat", "dog", "sea star"]
    assert (models["classes"]["guidable"], models["plain"]["guidable"]) == (True, False)
    assert (models["plain"]["class_names"], models["plain"]["max_steps"]) == (["image"], 1000)
    body = {"model": "classes", "label": "sea star", "num_steps": 3, "seed": 1}
    unguided, guided = (open_png(pngs(service.post({**body, "guidance_scale": w}))[0])[0] for w in (1, 4))
    assert not np.array_equal(unguided, guided)
    assert_invalid(service.post({**PLAIN, "guidance_scale": 2}), "body", "guidance_scale")
    assert_invalid(service.post({"model": "classes", "num_steps": 3}), "body", "label")
    assert_invalid(service.post({"model": "classes", "label": "none", "num_steps": 3}), "body", "label")


def test_number_of_steps_without_a_plan_is_refused_with_another_one(service: Service) -> None:
    assert service.post({"num_steps": 1, "sampler": "dpmpp"}).status_code == 200
    refused = service.post({"num_steps": 1000, "sampler": "dpmpp"})
    assert_invalid(refused, "body", "num_steps")
    assert refused.json()["detail"].endswith("has no plan for 1000 steps. Use 999, for example")
    assert_invalid(service.post({"num_steps": 1001}), "body", "num_steps")


def test_other_tasks_work_with_the_network_of_a_pipeline(service: Service) -> None:
    picture = {"image": service.post(PLAIN, PNG).content}
    mask = io.BytesIO()
    Image.fromarray(np.pad(np.full((8, 8), 255, np.uint8), 4)).save(mask, format="PNG")

    def send(path: str, **fields: str) -> httpx.Response:
        files = {**picture, **({"mask": mask.getvalue()} if path == "/inpaint" else {})}
        steps = {} if path == "/recognize" else {"num_steps": "4"}
        return service.client.post(path, files=files, data={**steps, **fields})

    for model in ("plain", "classes"):
        for path in ("/inpaint", "/edit", "/denoise"):
            noisy = {"noise_std": "20", "sampler": "euler", "label": "0"} if path == "/denoise" else {}
            response = send(path, model=model, **noisy)
            assert response.status_code == 200, response.text
    image, *_ = open_png(base64.b64decode(send("/inpaint", model="plain").json()["images"][0]["png"]))
    given, *_ = open_png(picture["image"])
    assert np.array_equal(image[:4], given[:4])
    recognised = send("/recognize", model="classes").json()
    assert sum(recognised["probabilities"]) == pytest.approx(1)
    assert_invalid(send("/recognize", model="plain"), "body", "model")


def test_other_protocols_serve_pipelines(service: Service) -> None:
    body = {"prompt": "an image of a sea star", "model": "classes", "quality": "low"}
    answer = service.client.post("/v1/images/generations", json=body).json()
    assert open_png(base64.b64decode(answer["data"][0]["b64_json"]))[1]["Label"] == "sea star"
    unknown = service.client.post("/v1/images/generations", json={"prompt": "a house"})
    assert "only class of the model 'plain': image" in unknown.json()["error"]["message"]
    request = {
        "inputs": [{"name": "label", "shape": [2], "datatype": "INT64", "data": [0, 2]}],
        "parameters": {"num_steps": 2},
    }
    outputs = service.client.post("/v2/models/classes/infer", json=request).json()["outputs"]
    assert outputs[0]["shape"] == [2, 16, 16, 3]
    request["parameters"] = {"num_steps": 101}
    assert service.client.post("/v2/models/classes/infer", json=request).status_code == 200


def test_long_request_can_be_cancelled_and_reaches_its_deadline(service: Service) -> None:
    assert service.post({"num_steps": 1000, "count": 8, "timeout_seconds": 0.2}).status_code == 504
    service.wait_until_idle()
    with service.events({"num_steps": 1000, "count": 8}, "?previews=3") as events:
        assert next(events)[0] == "accepted"
    service.wait_until_idle()


def test_openapi_document_permits_requests_without_a_class(service: Service) -> None:
    schemas = service.client.get("/openapi.json").json()["components"]["schemas"]
    assert {"required": ["label"]} not in [
        each for rule in schemas["GenerateRequest"]["allOf"] for each in rule.get("anyOf", [])
    ]


def without_scheduler(folder: Path) -> None:
    shutil.rmtree(folder / "scheduler")


def with_custom_code(folder: Path) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": ["own_code", "OwnScheduler"]}))


def with_truncated_weights(folder: Path) -> None:
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            without_scheduler,
            "is not a pipeline of diffusers: it has neither scheduler/scheduler_config.json nor scheduler_config.json",
        ),
        (with_custom_code, "has code of its own, which is not executed"),
        (with_truncated_weights, "cannot be loaded"),
    ],
)
def test_start_with_a_damaged_folder_prints_one_line(
    folder: Path, plain: Any, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(folder / "plain", tmp_path / "own")
    damage(tmp_path / "own")
    process = Process("app", UNFOG_MODELS=f"own={tmp_path / 'own'}")
    assert process.wait() == 2
    assert process.lines[-1].startswith("unfog: UNFOG_MODELS")
    assert message in process.lines[-1]
    assert "Traceback" not in "".join(process.lines)
