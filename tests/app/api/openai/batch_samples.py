"""Files and batches for tests without a socket."""

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from httpx import ASGITransport

from app.api.service import Service
from app.batches.service import BatchService
from tests.app.application import run
from tests.app.fakes import FakeRunner

GENERATIONS = "/v1/images/generations"


def line(custom_id: str, **body: Any) -> bytes:
    """Returns a line of an input file."""
    fields = {"custom_id": custom_id, "method": "POST", "url": GENERATIONS, "body": body}
    return json.dumps(fields).encode() + b"\n"


LINES = b"".join(line(f"line {i}", prompt="7", seed=i) for i in range(3))
OTHER_KEY = {"authorization": "Bearer another-key-0123456"}
KEYS = {"api_keys": "a-key-0123456789abcd,another-key-0123456"}


class Application:
    """A running application."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        assert isinstance(client._transport, ASGITransport)
        self.client = client
        self.service: Service = client._transport.app.state.service  # type: ignore[attr-defined] # it is a FastAPI
        self.batches: BatchService = self.service.batches
        # The unmodified client of OpenAI.
        self.openai = openai.AsyncOpenAI(
            base_url="http://test/v1", api_key="a-key-0123456789abcd", max_retries=0, http_client=client
        )

    async def upload(self, content: bytes = LINES, filename: str = "lines.jsonl", **headers: str) -> str:
        """Uploads a file, and returns its id."""
        files = {"file": (filename, content)}
        answer = await self.client.post("/v1/files", data={"purpose": "batch"}, files=files, headers=headers)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    async def create(self, file_id: str, **fields: Any) -> httpx.Response:
        """Creates a batch."""
        body = {"input_file_id": file_id, "endpoint": GENERATIONS, "completion_window": "24h", **fields}
        return await self.client.post("/v1/batches", json=body)

    async def batch(self, content: bytes = LINES) -> str:
        """Uploads a file and creates a batch that reads it. Returns the id of the batch."""
        answer = await self.create(await self.upload(content))
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])


def check(
    checks: Callable[[Application], Awaitable[None]], folder: Path, runner: FakeRunner | None = None, **settings: Any
) -> None:
    """Runs checks with an application whose database is in the folder."""

    async def main(client: httpx.AsyncClient) -> None:
        await checks(Application(client))

    run(main, runner or FakeRunner(), data_dir=folder, **settings)


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing works on batches, so that a test can do each step itself."""
    monkeypatch.setattr(BatchService, "start", lambda *arguments: None)
