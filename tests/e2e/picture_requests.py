"""Requests with pictures, in JSON and in multipart/form-data."""

import base64
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import numpy as np
from PIL import Image

from tests.app.api.examples import GENERATING, REQUESTS
from tests.e2e.process import TIMEOUT
from tests.e2e.service import EVENTS, JSON, Pixels, Service, read_events

SIZE = 28


def encode(pixels: np.ndarray, name: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, name, **options)
    return buffer.getvalue()


def drawing(seed: int = 0) -> Pixels:
    """Returns a random picture with a dark border, so that it is not inverted."""
    pixels = np.zeros((SIZE, SIZE), np.uint8)
    pixels[4:24, 4:24] = np.random.default_rng(seed).integers(0, 256, (20, 20), np.uint8)
    return pixels


def mask() -> Pixels:
    """Returns a mask that is white in a rectangle."""
    pixels = np.zeros((SIZE, SIZE), np.uint8)
    pixels[6:18, 10:22] = 255
    return pixels


IMAGE, MASK = encode(drawing()), encode(mask())
FEW_STEPS = 12  # of requests made from the examples


@dataclass(frozen=True)
class Ask:
    """A request with pictures."""

    path: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=lambda: {"image": IMAGE})

    @classmethod
    def of_example(cls, path: str) -> "Ask":
        """Returns the first example of the operation as a request for two images in a few steps."""
        body = {**next(iter(REQUESTS[path].values())), "seed": 5, "num_steps": FEW_STEPS, "count": 2}
        names = {"image", "mask"} & body.keys()
        files = {name: base64.b64decode(body.pop(name)) for name in names}
        return cls(path, body, files)

    def with_drawing(self, seed: int) -> "Ask":
        """Returns the request with a random picture of the same size."""
        with Image.open(io.BytesIO(self.files["image"])) as image:
            resized = Image.fromarray(drawing(seed)).resize(image.size, Image.Resampling.NEAREST)
        return self.having(image=encode(np.asarray(resized)))

    def having(self, **fields: Any) -> "Ask":
        """Returns the request with other fields. Values of type bytes are pictures."""
        files = {name: value for name, value in fields.items() if isinstance(value, bytes)}
        others = {name: value for name, value in fields.items() if name not in files}
        return replace(self, fields={**self.fields, **others}, files={**self.files, **files})

    @property
    def document(self) -> dict[str, Any]:
        """The body as JSON."""
        return {**self.fields, **{name: base64.b64encode(file).decode() for name, file in self.files.items()}}

    def send(self, service: Service, accept: str = JSON, headers: Mapping[str, str] | None = None) -> httpx.Response:
        return service.client.post(self.path, json=self.document, headers={"accept": accept, **(headers or {})})

    def send_form(self, service: Service, accept: str = JSON) -> httpx.Response:
        text = {name: str(value) for name, value in self.fields.items()}
        files = {name: (f"{name}.png", file, "image/png") for name, file in self.files.items()}
        return service.client.post(self.path, data=text, files=files, headers={"accept": accept})

    def result(self, service: Service) -> dict[str, Any]:
        """Returns the response without its times, which differ between equal requests."""
        response = self.send(service)
        assert response.status_code == 200, response.text
        return without_times(response)

    @contextmanager
    def events(self, service: Service, query: str = "") -> Iterator[Iterator[tuple[str, dict[str, Any]]]]:
        """Opens an event stream. Leaving the context closes the connection."""
        with (
            httpx.Client(base_url=service.url, timeout=TIMEOUT) as client,
            client.stream("POST", self.path + query, json=self.document, headers={"accept": EVENTS}) as response,
        ):
            assert response.status_code == 200, response.read()
            yield read_events(response)


def without_times(response: httpx.Response) -> dict[str, Any]:
    return {name: value for name, value in response.json().items() if name != "timing"}


BOTH = {"image": IMAGE, "mask": MASK}
RECOGNIZE = Ask("/recognize", {"num_pairs": 4})
DENOISE = Ask("/denoise", {"seed": 5, "noise_std": 60.0, "num_steps": 20, "count": 2})
INPAINT = Ask("/inpaint", {"seed": 6, "digit": 4, "num_steps": 3, "count": 2}, BOTH)
EDIT = Ask("/edit", {"seed": 7, "digit": 8, "num_steps": 12, "count": 2, "sampler": "dpmpp"})
TASKS = {
    "recognize": RECOGNIZE,
    "denoise": DENOISE,
    "denoise a digit": DENOISE.having(digit=2, guidance_scale=2.0, sampler="ddim"),
    "mean": Ask("/denoise", {"seed": 5, "noise_std": 60.0, "mode": "mean"}),
    "inpaint": INPAINT,
    "inpaint an unknown digit": Ask("/inpaint", {"seed": 6, "num_steps": 3, "count": 2, "sampler": "ddim"}, BOTH),
    "edit": EDIT,
    "edit an unknown digit": Ask("/edit", {"seed": 7, "num_steps": 12, "strength": 0.4, "guidance_scale": 1.5}),
}
TASKS |= {path[1:]: Ask.of_example(path) for path in GENERATING if path not in {ask.path for ask in TASKS.values()}}
