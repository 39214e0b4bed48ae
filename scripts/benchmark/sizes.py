"""Measures the size of answers: what leaves a service for each image, and what Prometheus reads."""

import asyncio
import statistics
from collections.abc import Mapping
from typing import Any

from scripts.benchmark.clients import EVENTS
from scripts.benchmark.http_client import HttpClient, Response
from scripts.common.errors import ScriptError

NUM_DIGITS, NUM_PREVIEWS = 10, 10


def measure_sizes(url: str, fields: Mapping[str, Any]) -> dict[str, float]:
    """Returns mean bytes of the parts of an answer with one image, and the number of time series of the service.

    `fields` are those of the requests, without the digit. The parts are the head, the body as PNG and as JSON, the
    events of a stream without previews, and one preview.
    """
    png, document, events, with_previews, metrics = asyncio.run(_responses(url, fields))
    of_stream = _mean_body(events)
    return {
        "head": statistics.mean(map(_head_bytes, png)),
        "png": _mean_body(png),
        "json": _mean_body(document),
        "events": of_stream,
        "preview": (_mean_body(with_previews) - of_stream) / NUM_PREVIEWS,
        "series": sum(not line.startswith(b"#") for line in metrics[0].content.splitlines()),
    }


async def _responses(url: str, fields: Mapping[str, Any]) -> list[list[Response]]:
    """Returns the answers as PNG, as JSON, as streams without and with previews, and the metrics after them."""
    async with HttpClient(url) as client:
        found = [
            [
                await client.request("POST", path, {**fields, "digit": digit, "seed": digit}, accept)
                for digit in range(NUM_DIGITS)
            ]
            for path, accept in (
                ("/generate", "image/png"),
                ("/generate", "application/json"),
                ("/generate?previews=0", EVENTS),
                (f"/generate?previews={NUM_PREVIEWS}", EVENTS),
            )
        ]
        found.append([await client.request("GET", "/metrics")])
    if failed := [response.status for responses in found for response in responses if response.status != 200]:
        raise ScriptError(f"A request whose answer is measured failed with status {failed[0]}")
    return found


def _mean_body(responses: list[Response]) -> float:
    return statistics.mean(len(response.content) for response in responses)


def _head_bytes(response: Response) -> int:
    """Returns the bytes of the head: the status line, the headers, and the line breaks."""
    status_line = len(f"HTTP/1.1 {response.status} OK\r\n")
    return status_line + sum(len(f"{name}: {value}\r\n") for name, value in response.headers.items()) + len("\r\n")
