"""Bodies of inference requests, in JSON and in binary form, and a check of errors."""

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

LENGTH = "Inference-Header-Content-Length"
PROTOCOL = Path(__file__).parents[3] / "e2e" / "open_inference_rest.yaml"
INFER = "/v2/models/default/infer"


def tensor(name: str, elements: Sequence[Any], **fields: Any) -> dict[str, Any]:
    """Returns an input with the elements in JSON."""
    return {"name": name, "datatype": "INT64", "shape": [len(elements)], "data": list(elements), **fields}


def body_of(digits: Sequence[Any], seeds: Sequence[Any] | None = None, **fields: Any) -> dict[str, Any]:
    """Returns a request whose tensors are JSON."""
    return {"inputs": [tensor("digit", digits), *([tensor("seed", seeds)] if seeds is not None else [])], **fields}


def raw_of(elements: Sequence[int]) -> bytes:
    """Returns elements in little-endian byte order."""
    return struct.pack(f"<{len(elements)}q", *elements)


def binary_tensor(name: str, number: int, size: int | None = None) -> dict[str, Any]:
    """Returns an input whose elements follow the JSON object."""
    parameters = {"binary_data_size": 8 * number if size is None else size}
    return {"name": name, "datatype": "INT64", "shape": [number], "parameters": parameters}


def binary_body(document: dict[str, Any], *raw: bytes) -> tuple[bytes, str]:
    """Returns a body with binary tensors, and its header for the length of the JSON object."""
    text = json.dumps(document).encode()
    return b"".join((text, *raw)), str(len(text))


def assert_error(response: httpx.Response, status: int, text: str = "") -> None:
    """Checks the form of an error of the protocol, and that its message contains the text."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    assert text in response.json()["error"]
