"""Calls files and batches of a running service with the unmodified Python client of OpenAI."""

import base64
import json
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import openai
from openai.types import Batch, FileObject

from tests.e2e.process import wait_until
from tests.e2e.service import Service

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
UNFINISHED = {"validating", "in_progress", "finalizing", "cancelling"}
FEW_STEPS: dict[str, Any] = {"quality": "medium", "size": "28x28"}  # 10 steps
LARGEST: dict[str, Any] = {"count": 64, "num_steps": 100}  # of /generate

Line = dict[str, Any]


def line(custom_id: str, body: dict[str, Any], url: str = GENERATIONS) -> Line:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def drawings(count: int, **fields: Any) -> list[Line]:
    """Returns lines that draw a digit each. Every fourth line has no seed."""
    seeds = ({"seed": number} if number % 4 else {} for number in range(count))
    bodies = ({"prompt": str(i % 10), **FEW_STEPS, **seed, **fields} for i, seed in enumerate(seeds))
    return [line(f"line-{i}", body) for i, body in enumerate(bodies)]


def long_lines(count: int) -> list[Line]:
    """Returns lines of /generate that take so long that a batch of them does not end during a test."""
    return [line(f"line-{i}", {"digit": i % 10, "seed": i, **LARGEST}, "/generate") for i in range(count)]


def jsonl(lines: Iterable[Line]) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


def png_of(answer: Line) -> list[bytes]:
    """Returns the images in a line of an output file."""
    body = answer["response"]["body"]
    return [base64.b64decode(each.get("b64_json") or each["png"]) for each in body.get("data") or body["images"]]


class Batches:
    """A client, and what tests often do with it."""

    def __init__(self, service: Service, key: str = "none", **options: Any) -> None:
        self.service = service
        self.client = openai.OpenAI(base_url=f"{service.url}/v1", api_key=key, max_retries=0, **options)

    def close(self) -> None:
        self.client.close()

    def upload(self, content: bytes | Iterable[Line], name: str = "lines.jsonl", **options: Any) -> FileObject:
        content = content if isinstance(content, bytes) else jsonl(content)
        return self.client.files.create(file=(name, content), purpose="batch", **options)

    def create(self, content: bytes | Iterable[Line], endpoint: Any = GENERATIONS, **options: Any) -> Batch:
        """Uploads the lines, and creates a batch of them."""
        file = self.upload(content)
        return self.client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **options)

    def get(self, batch: Batch) -> Batch:
        return self.client.batches.retrieve(batch.id)

    def wait_for(self, batch: Batch, statuses: Collection[str]) -> Batch:
        """Waits until the batch has one of the statuses."""
        found = [batch]

        def has_status() -> bool:
            found[0] = self.get(batch)
            return found[0].status in statuses

        wait_until(has_status, f"the batch is one of {sorted(statuses)}")
        return found[0]

    def end_of(self, batch: Batch) -> Batch:
        """Waits until the batch has ended, and returns its final state."""
        return self.wait_for(batch, {"completed", "failed", "expired", "cancelled"})

    def wait_for_answers(self, batch: Batch, count: int) -> None:
        """Waits until this number of lines have succeeded."""
        wait_until(lambda: num_answered(self.get(batch)) >= count, f"{count} lines have succeeded")

    def lines_of(self, file_id: str | None) -> list[Line]:
        """Returns the lines of a file of results. There are none if the batch has no such file."""
        if file_id is None:
            return []
        return [json.loads(each) for each in self.client.files.content(file_id).content.splitlines()]

    def results(self, batch: Batch) -> Sequence[list[Line]]:
        """Returns the lines that succeeded, and the others."""
        return self.lines_of(batch.output_file_id), self.lines_of(batch.error_file_id)


def num_answered(batch: Batch) -> int:
    """Returns the number of lines that have succeeded."""
    assert batch.request_counts
    return batch.request_counts.completed
