"""Requests of the OpenAI Images API for tests without a socket."""

import base64
import io
import json
from typing import Any

import httpx
import numpy as np
from PIL import Image

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
PATHS = (GENERATIONS, EDITS)


def picture(mode: str = "L") -> bytes:
    """Returns a PNG file of 28x28 pixels with a bright square."""
    pixels = np.zeros((28, 28), np.uint8)
    pixels[8:20, 8:20] = 255
    return encode(Image.fromarray(pixels).convert(mode))


def mask(size: int = 28) -> bytes:
    """Returns a PNG file whose lower half is transparent."""
    alpha = np.full((size, size), 255, np.uint8)
    alpha[size // 2 :] = 0
    return encode(Image.fromarray(np.dstack([np.zeros_like(alpha), alpha]), "LA"))


def encode(image: Image.Image, name: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name)
    return buffer.getvalue()


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def body_of(path: str, **fields: Any) -> dict[str, Any]:
    """Returns a JSON body. FakeRunner supports only small seeds."""
    image = {"image": in_base64(picture())} if path == EDITS else {}
    return {"prompt": "a seven, please", "seed": 3, "size": "28x28", **image, **fields}


async def send(client: httpx.AsyncClient, path: str, **fields: Any) -> httpx.Response:
    return await client.post(path, content=json.dumps(body_of(path, **fields)))


def error_of(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Checks that a response is an error in the format of OpenAI, and returns its object."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["error"]
    error: dict[str, Any] = response.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert error["code"] == code, error
    assert error["message"]
    return error


def events_of(response: httpx.Response) -> list[tuple[str, dict[str, Any]]]:
    """Returns the name and the data of each event."""
    assert response.headers["content-type"].startswith("text/event-stream")
    events = []
    for text in response.text.strip().split("\n\n"):
        name, data = text.split("\n")
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events
