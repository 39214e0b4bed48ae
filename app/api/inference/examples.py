"""Examples of the Open Inference Protocol for the OpenAPI document."""

from typing import Any

from app import VERSION, errors
from app.api.examples import general_errors
from app.api.inference.schemas import EXTENSIONS, NAME, PLATFORM
from app.api.responses import JSON
from app.settings import Settings

INFER_PATH = "/v2/models/{name}/infer"
_DIGITS = {"name": "digit", "datatype": "INT64", "shape": [3], "data": [7, 7, 0]}
_SEEDS = {"name": "seed", "datatype": "INT64", "shape": [3], "data": [1, 2, 3]}

REQUESTS: dict[str, dict[str, Any]] = {
    "seeds": {
        "summary": "Three digits with fixed seeds. The response has only the images",
        "value": {
            "id": "42",
            "parameters": {"num_steps": 4, "sampler": "ddim", "guidance_scale": 1},
            "inputs": [_DIGITS, _SEEDS],
            "outputs": [{"name": "image"}],
        },
    },
    "one": {"summary": "One digit", "value": {"inputs": [{**_DIGITS, "shape": [1], "data": [7]}]}},
    "binary": {
        "summary": "Three digits. The outputs are binary",
        "value": {"parameters": {"binary_data_output": True}, "inputs": [_DIGITS]},
    },
}
_SEED_METADATA = {"name": "seed", "datatype": "INT64", "shape": [-1]}
ANSWERS: dict[tuple[str, str, str], Any] = {  # (path, status, media type) -> example
    ("/v2", "200", JSON): {"name": NAME, "version": VERSION, "extensions": EXTENSIONS},
    ("/v2/health/live", "200", JSON): {"live": True},
    ("/v2/health/live", "503", JSON): {"live": False},
    ("/v2/health/ready", "200", JSON): {"ready": True},
    ("/v2/health/ready", "503", JSON): {"ready": False},
    ("/v2/models/{name}", "200", JSON): {
        "name": "default",
        "platform": PLATFORM,
        "inputs": [{"name": "digit", "datatype": "INT64", "shape": [-1]}, _SEED_METADATA],
        "outputs": [{"name": "image", "datatype": "UINT8", "shape": [-1, 28, 28, 1]}, _SEED_METADATA],
    },
    ("/v2/models/{name}/ready", "200", JSON): {"name": "default", "ready": True},
    ("/v2/models/{name}/ready", "503", JSON): {"name": "default", "ready": False},
    (INFER_PATH, "200", JSON): {
        "model_name": "default",
        "id": "42",
        "outputs": [{"name": "seed", "datatype": "INT64", "shape": [3], "data": [1, 2, 3]}],
    },
}


def errors_of(settings: Settings) -> list[errors.UnfogError]:
    """Returns examples of the errors of these routes."""
    return [
        *general_errors(settings, settings.max_body_bytes),
        errors.NotFound(f"No model has this name. The models are: {', '.join(settings.model_names)}"),
        errors.InvalidRequest([{"loc": ["body", "inputs"], "msg": "The input 'digit' is required"}]),
    ]
