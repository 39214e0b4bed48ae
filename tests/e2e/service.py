"""A client of a running service: requests, what came back, and its metrics."""

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
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.process import PATIENCE, ROOT, Process, eventually

JSON, PNG, ZIP, EVENTS = "application/json", "image/png", "application/zip", "text/event-stream"
PROBLEM = {"type", "title", "status", "detail", "code", "request_id"}
# What an answer must never hold: traces, paths, names from inside.
INSIDE = re.compile(rf"Traceback|\.py\b|{re.escape(str(ROOT))}|/tmp/|torch|pydantic|GenerateRequest|\bapp\.|\bat 0x")

Pixels = npt.NDArray[np.uint8]


class Samples(dict[tuple[str, frozenset[tuple[str, str]]], float]):
    """One scrape: a value for each name and set of labels."""

    def of(self, name: str, /, **labels: str) -> float:
        """A sample, 0 where there is none yet."""
        return self.get((f"unfog_{name}", frozenset(labels.items())), 0.0)


class Service:
    """A process that is ready, and an HTTP client for it."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.url = process.wait_until_ready()
        self.address = httpx.URL(self.url).host, httpx.URL(self.url).port or 0
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE)

    def post(self, body: Any, accept: str = JSON, query: str = "", **headers: str) -> httpx.Response:
        """POST /generate; a body of bytes goes as it is."""
        return self.client.post(f"/generate{query}", **_request(body, accept, headers))

    def images(self, **body: Any) -> list[bytes]:
        """The PNGs of a request that succeeds."""
        answer = self.post(body)
        assert answer.status_code == 200, answer.text
        return pngs(answer)

    @contextmanager
    def events(self, body: Any, query: str = "") -> Iterator[Iterator[tuple[str, dict[str, Any]]]]:
        """The stream of a request's events; leaving it closes the connection."""
        with (
            httpx.Client(base_url=self.url, timeout=PATIENCE) as client,
            client.stream("POST", f"/generate{query}", **_request(body, EVENTS, {})) as answer,
        ):
            assert answer.status_code == 200, answer.read()
            yield read_events(answer)

    def metrics(self) -> Samples:
        """A scrape."""
        families = text_string_to_metric_families(self.client.get("/metrics").text)
        return Samples(
            ((sample.name, frozenset(sample.labels.items())), sample.value)
            for family in families
            for sample in family.samples
        )

    def mean_rows_since(self, before: Samples) -> float:
        """Rows a step, averaged over the steps since a scrape."""
        after = self.metrics()
        rows, steps = (after.of(f"batch_rows_{part}") - before.of(f"batch_rows_{part}") for part in ("sum", "count"))
        return rows / steps

    def wait_for(self, value: float, name: str, /, **labels: str) -> None:
        """Waits until a metric has the value."""
        eventually(lambda: self.metrics().of(name, **labels) == value, f"{name} {labels} is {value}")

    def wait_until_running(self) -> None:
        """Waits until an image has had a step."""
        eventually(lambda: self.metrics().of("running_images"), "images run")

    def wait_until_idle(self) -> None:
        """Waits until no image is left anywhere."""
        self.wait_for(0, "running_images")
        self.wait_for(0, "queue_depth_images")

    def end(self) -> int:
        """Stops it as an operator does."""
        self.client.close()
        self.process.signal(signal.SIGTERM)
        return self.process.wait()


def _request(body: Any, accept: str, headers: dict[str, str]) -> dict[str, Any]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return {"content": content, "headers": {"accept": accept, "content-type": JSON, **headers}}


def pngs(answer: httpx.Response) -> list[bytes]:
    """The files in a JSON answer, in order."""
    return [base64.b64decode(image["png"], validate=True) for image in answer.json()["images"]]


def read_events(answer: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """Server-sent events, each one `event:` and one `data:` line and an empty one."""
    lines = answer.iter_lines()
    for line in lines:
        kind, name = line.split(": ", 1)
        data_kind, data = next(lines).split(": ", 1)
        assert (kind, data_kind, next(lines)) == ("event", "data", "")
        yield name, json.loads(data)


def open_png(png: bytes) -> tuple[Pixels, dict[str, str], str]:
    """Pixels, text chunks and Pillow's mode."""
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image), dict(image.text), image.mode  # type: ignore[attr-defined]


def assert_problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The answer is a problem document of that status and code, and tells nothing from inside."""
    problem: dict[str, Any] = answer.json()
    assert (answer.status_code, problem["code"], problem["status"]) == (status, code, status), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert set(problem) == PROBLEM | ({"errors"} if status == 422 else set())
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert problem["title"]
    assert problem["detail"]
    assert not INSIDE.search(answer.text), answer.text
    assert status not in (429, 503) or int(answer.headers["retry-after"]) >= 1
    return problem


def assert_invalid(answer: httpx.Response, *location: str) -> None:
    """422, and the first error is there."""
    problem = assert_problem(answer, 422, "invalid_request")
    assert problem["errors"][0]["loc"] == list(location), answer.text
    assert problem["errors"][0]["msg"]
