"""A Python client: generates digits, shows the progress, recognises a digit, and retries failed requests.

Install: pip install httpx
Run:     python examples/client.py [FOLDER]
"""

import json
import os
import sys
import time
import uuid
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

URL = os.environ.get("UNFOG_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("UNFOG_API_KEY")
MAX_ATTEMPTS, MAX_WAIT = 5, 60  # MAX_WAIT is in seconds


def post(client: httpx.Client, path: str, accept: str, **content: Any) -> httpx.Response:
    """Sends a request. Retries it after a lost connection, and after 429 or 503 when the time in Retry-After is over.

    All attempts have the same Idempotency-Key, so they get the same images. Raises RuntimeError for other errors.
    """
    headers = {"Accept": accept, "Idempotency-Key": str(uuid.uuid4())}
    request = client.build_request("POST", path, headers=headers, **content)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            response = client.send(request, stream=True)  # the caller reads the body
            if response.status_code == 200:
                return response
            problem, wait = response.read().decode(), response.headers.get("Retry-After")  # only 429 and 503 have it
        except (httpx.NetworkError, httpx.RemoteProtocolError) as error:
            problem, wait = str(error), "1"
        if wait is None or int(wait) > MAX_WAIT or attempt == MAX_ATTEMPTS:
            break
        print(f"attempt {attempt} failed, next attempt in {wait} s: {problem}")
        time.sleep(int(wait))
    raise RuntimeError(problem)


def events(response: httpx.Response) -> Iterator[tuple[str, Any]]:
    """Yields the name and the data of each event of an event stream."""
    lines = response.iter_lines()
    for line in lines:
        if line.startswith("event: "):
            yield line.removeprefix("event: "), json.loads(next(lines).removeprefix("data: "))


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    headers = {"Authorization": f"Bearer {KEY}"} if KEY else {}
    body = {"digit": 7, "sampler": "dpmpp", "num_steps": 10, "scale": 4}
    with httpx.Client(base_url=URL, headers=headers, timeout=60) as client:
        response = post(client, "/generate", "image/png", json=body)
        (folder / "seven.png").write_bytes(response.read())
        print("wrote seven.png with seed", response.headers["X-Seed"])

        for name, data in events(post(client, "/generate?previews=5", "text/event-stream", json={**body, "count": 2})):
            if name == "progress":
                print(f"step {data['step']} of {data['of']}")
            elif name == "image":
                (folder / f"stream-{data['index']}.png").write_bytes(b64decode(data["png"]))
                print(f"wrote stream-{data['index']}.png")
            elif name == "error":
                raise RuntimeError(data["detail"])

        files = {"image": (folder / "seven.png").read_bytes()}
        answer = json.loads(post(client, "/recognize", "application/json", files=files).read())
        print(f"recognised {answer['digit']} with probability {max(answer['probabilities'])}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
