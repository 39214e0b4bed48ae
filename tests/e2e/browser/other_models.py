"""Replaces the parts of the API that depend on the model, so that the page has models with other classes and images."""

import base64
import io
import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from playwright.sync_api import Page, Route

from model.png import SOFTWARE, encode_pixels, encode_png
from model.schedule import Schedule, ScheduleConfig

DIGITS = [str(digit) for digit in range(10)]
NAMES = [
    *("apple", "automobile", "bee", "bottle", "butterfly", "camel", "castle", "cattle", "clock", "cloud"),
    *("dolphin", "elephant", "forest", "house", "lamp", "lion", "mountain", "mouse", "orange", "café"),
]
STEPS = 4  # events of a run
Model = dict[str, Any]
Pixels = npt.NDArray[np.uint8]


def model(name: str, class_names: list[str], image_shape: tuple[int, int, int], **fields: Any) -> Model:
    """Returns a model of GET /models. `fields` replaces fields of a model with all samplers, steps and tasks."""
    return {
        "name": name,
        "sha256": (name.encode().hex() * 64)[:64],
        "num_parameters": 1,
        "image_shape": image_shape,
        "num_classes": len(class_names),
        "class_names": class_names,
        "normalises_drawings": class_names == DIGITS,
        "max_steps": 100,
        "steps": [],
        "default_steps": 100,
        "samplers": ["ddpm", "ddim", "dpmpp"],
        "qualities": {
            "draft": {"sampler": "dpmpp", "num_steps": 6},
            "balanced": {"sampler": "dpmpp", "num_steps": 10},
            "best": {"sampler": "ddpm", "num_steps": 100},
        },
        "guidable": True,
        "guidance_scale": {"ddpm": 2.5, "ddim": 1.4, "dpmpp": 1.4},
        "guidance_interval": {"ddpm": [20, 65], "ddim": [40, 90], "dpmpp": [40, 90]},
        "alpha_bar": [round(value, 6) for value in Schedule(ScheduleConfig()).alpha_bar.tolist()],
        "has_picture_tasks": True,
        "training": {"evaluations": []},
        "device": "cpu",
        "dtype": "float32",
        "compiled": False,
        **fields,
    }


COLOUR = model("pictures", NAMES, (3, 32, 32))


def pixels_of(served: Model, label: int, index: int) -> Pixels:
    """Returns the image that the stub generates: one colour for each class, brighter for each index."""
    channels, height, width = served["image_shape"]
    colour = [40 + 10 * label, 200 - 9 * label, 100 + 10 * index][:channels]
    return np.full((height, width, channels), colour, np.uint8)


def png_of(served: Model, label: int, index: int, task: str = "generate") -> bytes:
    """Returns this image as a PNG file with the text chunks of the service."""
    name = served["class_names"][label]
    text = {
        "Software": SOFTWARE,
        "Label": name if name.isascii() else json.dumps(name),
        **({"Digit": name} if served["class_names"] == DIGITS else {}),
        **({} if task == "generate" else {"Task": task}),
        "Seed": "5",
        "Index": str(index),
        "Sampler": "ddpm",
        "Steps": "100",
        "Guidance-Scale": "3.0",
        "Model-SHA256": served["sha256"],
    }
    return encode_pixels(pixels_of(served, label, index), text=text)


def picture_in(body: dict[str, Any], name: str = "image") -> Image.Image:
    """Returns a picture of a request."""
    return Image.open(io.BytesIO(base64.b64decode(body[name])))


def serve(*models: Model) -> Callable[[Page], None]:
    """Returns a function that prepares a page: the service has these models. The first one is the default."""
    served = {each["name"]: each for each in models}
    limits = {"count": 64, "timeout_seconds": 600, "image_bytes": 4_194_304, "queue_images": 1024}

    def answer(route: Route) -> None:
        request = route.request
        body, task = request.post_data_json, request.url.split("?")[0].rsplit("/", 1)[-1]
        assert "digit" not in body
        chosen = served[body["model"]]
        label = body.get("label", min(2, chosen["num_classes"] - 1))
        assert 0 <= label < chosen["num_classes"]
        result = _result(chosen, label, body)
        if body.get("strength") == 0 or body.get("mode") == "mean":
            mode = "RGB" if chosen["image_shape"][0] == 3 else "L"
            height, width = chosen["image_shape"][1:]
            same = encode_png(picture_in(body).convert(mode).resize((width, height)))
            route.fulfill(json={**result, "noise_std": 100.0, "images": [{"png": _base64(same)}]})
            return
        images = [_base64(png_of(chosen, label, index, task)) for index in range(body.get("count", 1))]
        if request.headers["accept"] == "text/event-stream":
            route.fulfill(body=_events(result, images), content_type="text/event-stream")
        elif task == "recognize":
            route.fulfill(json={**result, "is_digit": None})
        else:
            route.fulfill(json={**result, "images": [{"png": png} for png in images]})

    def prepare(page: Page) -> None:
        content = {"models": models, "limits": limits, "clip": None}
        page.route("**/models", lambda route: route.fulfill(json=content))
        for path in ("generate", "denoise", "inpaint", "edit", "recognize"):
            page.route(re.compile(rf"/{path}(\?|$)"), answer)

    return prepare


def _base64(png: bytes) -> str:
    return base64.b64encode(png).decode()


def _result(chosen: Model, label: int, body: dict[str, Any]) -> dict[str, Any]:
    """Returns what the answers of all tasks have in common. The class `label` has 90%."""
    probabilities = [0.1 / max(1, chosen["num_classes"] - 1)] * chosen["num_classes"]
    probabilities[label] = 0.9
    return {
        "label": chosen["class_names"][label],
        "digit": label if chosen["class_names"] == DIGITS else None,
        "probabilities": probabilities,
        "seed": body.get("seed", 5),
        "num_steps": body.get("num_steps", 100),
        "guidance_scale": body.get("guidance_scale", 3.0),
        "evaluations": 1,
        "timing": {"denoise_seconds": 0.1, "total_seconds": 0.1},
    }


def _events(result: dict[str, Any], images: list[str]) -> str:
    """Returns the event stream of a run."""
    events: list[tuple[str, dict[str, Any]]] = [("accepted", {"job": 1, "position": 0, "eta_seconds": 0.1})]
    for step in range(1, STEPS + 1):
        events.append(("progress", {"step": step, "of": STEPS, "previews": images, "x_t": images}))
    events += [("image", {"index": index, "png": png}) for index, png in enumerate(images)]
    return "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in [*events, ("done", result)])
