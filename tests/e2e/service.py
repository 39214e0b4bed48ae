"""A client of a running service: sends requests, reads responses and scrapes metrics."""

import base64
import io
import json
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.process import ROOT, TIMEOUT, Process, wait_until

JSON, PNG, ZIP, EVENTS = "application/json", "image/png", "application/zip", "text/event-stream"
WEBP, GIF = "image/webp", "image/gif"
PROBLEM_FIELDS = {"type", "title", "status", "detail", "code", "request_id"}
# A response must not contain stack traces, paths or internal names.
INTERNAL_DETAILS = re.compile(
    rf"Traceback|\.py\b|{re.escape(str(ROOT))}|/tmp/|torch|pydantic|GenerateRequest|\bapp\.|\bat 0x"
)

Pixels = npt.NDArray[np.uint8]


class Samples(dict[tuple[str, frozenset[tuple[str, str]]], float]):
    """One scrape of /metrics: a value for each metric name and set of labels."""

    def value(self, name: str, /, **labels: str) -> float:
        """Returns the sum of the samples of unfog_<name> with these labels, or 0 if there are none."""
        wanted = labels.items()
        return sum(value for (each, own), value in self.items() if each == f"unfog_{name}" and wanted <= own)


class Service:
    """A ready service and an HTTP client for it."""

    def __init__(self, process: Process | None, url: str = "") -> None:
        """Waits until the process is ready. Without a process, the service at `url` runs already."""
        self._process = process
        self.url = process.wait_until_ready() if process else url
        self.address = httpx.URL(self.url).host, httpx.URL(self.url).port or 0
        self.client = httpx.Client(base_url=self.url, timeout=TIMEOUT)

    @property
    def process(self) -> Process:
        """The process of the service. A test that uses it cannot run with --service."""
        if self._process is None:
            pytest.skip("needs the process of the service")
        return self._process

    def post(self, body: Any, accept: str = JSON, query: str = "", **headers: str) -> httpx.Response:
        """Sends POST /generate. The body is encoded as JSON unless it is bytes."""
        return self.client.post(f"/generate{query}", **_request(body, accept, headers))

    def images(self, **body: Any) -> list[bytes]:
        """Returns the PNG files of a request. Fails unless the status is 200."""
        response = self.post(body)
        assert response.status_code == 200, response.text
        return pngs(response)

    @contextmanager
    def events(self, body: Any, query: str = "") -> Iterator[Iterator[tuple[str, dict[str, Any]]]]:
        """Opens an event stream for a request. Leaving the context closes the connection."""
        with (
            httpx.Client(base_url=self.url, timeout=TIMEOUT) as client,
            client.stream("POST", f"/generate{query}", **_request(body, EVENTS, {})) as response,
        ):
            assert response.status_code == 200, response.read()
            yield read_events(response)

    def metrics(self) -> Samples:
        families = text_string_to_metric_families(self.client.get("/metrics").text)
        return Samples(
            ((sample.name, frozenset(sample.labels.items())), sample.value)
            for family in families
            for sample in family.samples
        )

    def mean_rows_since(self, before: Samples) -> float:
        """Returns the mean rows per step since the scrape `before`."""
        after = self.metrics()
        rows, steps = (
            after.value(f"batch_rows_{part}") - before.value(f"batch_rows_{part}") for part in ("sum", "count")
        )
        return rows / steps

    def wait_for(self, value: float, name: str, /, **labels: str) -> None:
        wait_until(lambda: self.metrics().value(name, **labels) == value, f"{name} {labels} is {value}")

    def wait_until_running(self) -> None:
        """Waits until an image has started its first step."""
        wait_until(lambda: self.metrics().value("running_images"), "at least one image runs")

    def wait_until_idle(self) -> None:
        """Waits until no image is queued or running."""
        self.wait_for(0, "running_images")
        self.wait_for(0, "queue_depth_images")

    def stop(self) -> int:
        """Stops the process with SIGTERM and returns its exit status."""
        self.client.close()
        self.process.signal(signal.SIGTERM)
        return self.process.wait()


def _request(body: Any, accept: str, headers: dict[str, str]) -> dict[str, Any]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return {"content": content, "headers": {"accept": accept, "content-type": JSON, **headers}}


def pngs(response: httpx.Response) -> list[bytes]:
    """Returns the PNG files of a JSON response in order."""
    return [base64.b64decode(image["png"], validate=True) for image in response.json()["images"]]


def read_events(response: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """Parses server-sent events: a line `event:`, a line `data:` and an empty line each."""
    lines = response.iter_lines()
    for line in lines:
        kind, name = line.split(": ", 1)
        data_kind, data = next(lines).split(": ", 1)
        assert (kind, data_kind, next(lines)) == ("event", "data", "")
        yield name, json.loads(data)


def open_png(png: bytes) -> tuple[Pixels, dict[str, str], str]:
    """Returns the pixels, the text chunks and Pillow's mode of a PNG."""
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image), dict(image.text), image.mode  # type: ignore[attr-defined]


def open_animation(content: bytes) -> list[Pixels]:
    """Returns the frames of a grey animation."""
    frames = []
    with Image.open(io.BytesIO(content)) as image:
        for number in range(image.n_frames):  # type: ignore[attr-defined]
            image.seek(number)
            frames.append(np.asarray(image.convert("L")))
    return frames


def assert_problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Checks that the response is a problem document (RFC 9457) without internal details, and returns it."""
    problem: dict[str, Any] = response.json()
    assert (response.status_code, problem["code"], problem["status"]) == (status, code, status), response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert set(problem) == PROBLEM_FIELDS | ({"errors"} if status == 422 else set())
    assert problem["request_id"] == response.headers["x-request-id"]
    assert problem["title"]
    assert problem["detail"]
    assert not INTERNAL_DETAILS.search(response.text), response.text
    assert status not in (429, 502, 503) or int(response.headers["retry-after"]) >= 1
    return problem


def assert_invalid(response: httpx.Response, *location: str) -> None:
    """Checks that the status is 422 and that the first error has this location."""
    problem = assert_problem(response, 422, "invalid_request")
    assert problem["errors"][0]["loc"] == list(location), response.text
    assert problem["errors"][0]["msg"]
