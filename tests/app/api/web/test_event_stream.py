"""Runs the parser of event streams in node, with streams that arrive in parts of any size."""

import base64
import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from app.api.http.events import event_text

WEB = Path(__file__).parents[4] / "app" / "api" / "web"
# Reads cases from stdin. A case has the parts of a stream, and what happens after the last part: "end" ends the stream,
# "break" fails it, and "stop" means that the reader stops after the first event. Prints what the reader received.
PROGRAM = """
const { eventsOf } = await import(process.argv[1]);
const input = await new Response(process.stdin).text();
const results = [];
for (const { parts, then } of JSON.parse(input)) {
  const found = { events: [], error: null, cancelled: false };
  const left = parts.map((part) => Uint8Array.from(atob(part), (character) => character.charCodeAt(0)));
  const body = new ReadableStream({
    pull(controller) {
      if (left.length) controller.enqueue(left.shift());
      else if (then === "break") controller.error(new TypeError("network error"));
      else if (then === "end") controller.close();
    },
    cancel() {
      found.cancelled = true;
    },
  });
  try {
    for await (const event of eventsOf(body)) {
      found.events.push(event);
      if (then === "stop") break;
    }
  } catch (error) {
    found.error = error.message;
  }
  results.push(found);
}
console.log(JSON.stringify(results));
"""
DATA: list[tuple[str, dict[str, Any]]] = [
    ("accepted", {"seed": 7, "position": 0}),
    ("progress", {"label": "\u00e9 \u20ac \U0001d11e", "text": "a: b\n\nc", "of": 2}),  # 2, 3 and 4 bytes in UTF-8
    ("done", {}),
]
EVENTS = [{"name": name, "data": data} for name, data in DATA]
STREAM = "".join(f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n" for name, data in DATA).encode()
LINE_ENDS = pytest.mark.parametrize("stream", [STREAM, STREAM.replace(b"\n", b"\r\n")], ids=["LF", "CRLF"])

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="needs node")


def read(*cases: Sequence[bytes], then: str = "end") -> list[dict[str, Any]]:
    """Returns what the reader received in each case."""
    encoded = [{"parts": [base64.b64encode(part).decode() for part in parts], "then": then} for parts in cases]
    command = ["node", "--input-type=module", "--eval", PROGRAM, (WEB / "event-stream.js").as_uri()]
    done = subprocess.run(command, input=json.dumps(encoded), capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = json.loads(done.stdout)
    return results


@LINE_ENDS
def test_stream_in_parts_of_a_few_bytes_gives_the_same_events(stream: bytes) -> None:
    for found in read(*([stream[i : i + size] for i in range(0, len(stream), size)] for size in (1, 2, 3, 7))):
        assert (found["events"], found["error"]) == (EVENTS, None)


@LINE_ENDS
def test_stream_in_two_parts_gives_the_same_events_wherever_it_is_divided(stream: bytes) -> None:
    for found in read(*([stream[:cut], stream[cut:]] for cut in range(len(stream) + 1))):
        assert (found["events"], found["error"]) == (EVENTS, None)


def test_events_of_the_service_are_read() -> None:
    (found,) = read(["".join(event_text(name, data) for name, data in DATA).encode()])
    assert found["events"] == EVENTS


@LINE_ENDS
def test_broken_stream_gives_the_complete_events_and_an_error(stream: bytes) -> None:
    last = stream.rindex(b"event: ")
    for found in read([stream[:last]], [stream[:-1]], then="break"):
        assert (found["events"], found["error"]) == (EVENTS[:-1], "network error")


@LINE_ENDS
def test_incomplete_event_at_the_end_is_dropped(stream: bytes) -> None:
    (found,) = read([stream[:-1]])
    assert (found["events"], found["error"]) == (EVENTS[:-1], None)


def test_stream_is_cancelled_when_its_reader_stops() -> None:
    (found,) = read([STREAM[:200], STREAM[200:]], then="stop")
    assert (found["events"], found["cancelled"]) == (EVENTS[:1], True)
