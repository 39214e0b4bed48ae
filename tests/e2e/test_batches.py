"""Files and batches, called by the unmodified clients of OpenAI for Python and JavaScript."""

import base64
import io
import json
import os
import sqlite3
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import httpx
import openai
import pytest

from app.batches.batches import DELETED, NOT_FOUND
from app.batches.database import FILE
from tests.app.api.openai.samples import mask
from tests.e2e.batch_client import (
    EDITS,
    FEW_STEPS,
    GENERATIONS,
    UNFINISHED,
    Batches,
    Line,
    drawings,
    jsonl,
    line,
    long_lines,
    num_answered,
    png_of,
)
from tests.e2e.conftest import Connect, Start, StartBatches, start_service
from tests.e2e.picture_requests import IMAGE, MASK
from tests.e2e.process import TIMEOUT, wait_until
from tests.e2e.service import INTERNAL_DETAILS, pngs

IN_BASE64 = base64.b64encode(IMAGE).decode()
MASK_IN_BASE64 = base64.b64encode(MASK).decode()
OWN: dict[str, dict[str, Any]] = {  # a request of each route
    "/generate": {"digit": 7, "count": 2, "seed": 3, "num_steps": 10},
    "/recognize": {"image": IN_BASE64, "num_pairs": 4},
    "/denoise": {"image": IN_BASE64, "noise_std": 0.5, "seed": 3, "num_steps": 20},
    "/inpaint": {"image": IN_BASE64, "mask": MASK_IN_BASE64, "seed": 3, "num_steps": 20},
    "/edit": {"image": IN_BASE64, "digit": 7, "seed": 3, "num_steps": 20},
}
UNKNOWN_FILE, UNKNOWN_BATCH = "file-" + 24 * "0", "batch_" + 24 * "0"
SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
CREATE: dict[str, Any] = {"endpoint": GENERATIONS, "completion_window": "24h"}
ARCHIVES = ("images.zip", "images.parquet")


@pytest.fixture(scope="module")
def batches(checkpoint: Path) -> Iterator[Batches]:
    """A service whose batches all have ended."""
    with ExitStack() as stack:
        service = start_service(stack, checkpoint, UNFOG_MAX_BATCH="64", UNFOG_REQUEST_TIMEOUT="300")
        yield stack.enter_context(closing(Batches(service)))


def test_batch_of_generations_has_the_images_of_interactive_requests(batches: Batches) -> None:
    lines = [line(f"ß {i}", {"prompt": str(i), "n": 1 + i % 3, "seed": i, **FEW_STEPS}) for i in range(10)]
    batch = batches.end_of(batches.create(lines, metadata={"purpose": "a test"}))
    assert (batch.status, batch.errors, batch.error_file_id) == ("completed", None, None)
    assert batch.request_counts and batch.request_counts.to_dict() == {"total": 10, "completed": 10, "failed": 0}
    assert (batch.endpoint, batch.metadata, batch.completion_window) == (GENERATIONS, {"purpose": "a test"}, "24h")
    assert batch.expires_at == batch.created_at + 24 * 3600
    assert batch.in_progress_at and batch.finalizing_at and batch.completed_at
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    assert batch.model_extra and batch.model_extra["images"] == 19
    answers, _ = batches.results(batch)
    assert [each["custom_id"] for each in answers] == [each["custom_id"] for each in lines]
    assert len({each["id"] for each in answers}) == len({each["response"]["request_id"] for each in answers}) == 10
    for answer, asked in zip(answers, lines, strict=True):
        assert (answer["response"]["status_code"], answer["error"]) == (200, None)
        expected = batches.client.images.generate(**_extra(asked["body"]))
        assert answer["response"]["body"]["data"] == [each.to_dict() for each in expected.data or ()]


def _extra(body: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of OpenAI's client, which does not know the field `seed`."""
    return {**{name: value for name, value in body.items() if name != "seed"}, "extra_body": {"seed": body["seed"]}}


def test_batch_of_edits_has_the_images_of_interactive_requests(batches: Batches) -> None:
    body = {"prompt": "7", "n": 2, "seed": 5, "size": "56x56"}
    masked = base64.b64encode(mask()).decode()
    lines = [
        line("edited", {**body, "image": IN_BASE64, "quality": "medium"}, EDITS),
        line("filled", {**body, "image": IN_BASE64, "mask": masked}, EDITS),
    ]
    answers, errors = batches.results(batches.end_of(batches.create(lines, EDITS)))
    assert not errors
    edited = batches.client.images.edit(**_extra(body), image=IMAGE, quality="medium")
    filled = batches.client.images.edit(**_extra(body), image=IMAGE, mask=mask())
    for answer, expected in zip(answers, (edited, filled), strict=True):
        assert png_of(answer) == [base64.b64decode(each.b64_json or "") for each in expected.data or ()]


@pytest.mark.parametrize("path", OWN)
def test_batch_of_an_own_route_has_its_answers(batches: Batches, path: str) -> None:
    bodies = [{**OWN[path], **fields} for fields in ({}, {"unknown": 1}, {"model": "default"})]
    batch = batches.end_of(batches.create([line(str(number), body, path) for number, body in enumerate(bodies)], path))
    assert batch.status == "completed"
    answers, errors = batches.results(batch)
    assert [[each["custom_id"] for each in of_state] for of_state in (answers, errors)] == [["0", "2"], ["1"]]
    for answer in (*answers, *errors):
        expected = batches.service.client.post(path, json=bodies[int(answer["custom_id"])])
        assert answer["response"]["status_code"] == expected.status_code
        assert _lasting(answer["response"]["body"]) == _lasting(expected.json())


def _lasting(body: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields that are the same in two answers to one request."""
    return {name: value for name, value in body.items() if name not in ("request_id", "timing")}


def test_lines_have_no_deadline(batches: Batches) -> None:
    body = {"digit": 7, "count": 8, "seed": 3, "num_steps": 50, "timeout_seconds": 0.01}
    assert batches.service.client.post("/generate", json=body).status_code == 504
    answers, errors = batches.results(batches.end_of(batches.create([line("a", body, "/generate")], "/generate")))
    assert not errors
    del body["timeout_seconds"]
    assert png_of(answers[0]) == batches.service.images(**body)


def test_batch_generates_a_picture_again(batches: Batches) -> None:
    (png,) = batches.service.images(digit=4, seed=8, num_steps=10)
    lines = [line("again", {"image": base64.b64encode(png).decode()}, "/reproduce")]
    answers, _ = batches.results(batches.end_of(batches.create(lines, "/reproduce")))
    assert png_of(answers[0]) == [png]


def test_error_of_a_line_is_that_of_its_route_and_the_other_lines_succeed(batches: Batches) -> None:
    refused: dict[str, dict[str, Any]] = {
        "class": {"prompt": "a cat"},
        "field": {"prompt": "7", "unknown": 1},
        "stream": {"prompt": "7", "stream": True},
        "size": {"prompt": "7", "size": "1x1"},
    }
    lines = [*drawings(3), *(line(name, body) for name, body in refused.items())]
    batch = batches.end_of(batches.create(lines))
    assert batch.status == "completed"
    assert batch.request_counts and batch.request_counts.to_dict() == {"total": 7, "completed": 3, "failed": 4}
    answers, errors = batches.results(batch)
    assert [each["custom_id"] for each in answers] == ["line-0", "line-1", "line-2"]
    assert [each["custom_id"] for each in errors] == list(refused)
    for error in errors:
        if error["custom_id"] != "stream":
            expected = batches.service.client.post(GENERATIONS, json=refused[error["custom_id"]])
            assert error["response"]["body"] == expected.json()
        assert error["response"]["status_code"] == 400
        assert not INTERNAL_DETAILS.search(json.dumps(error))
    params = [each["response"]["body"]["error"]["param"] for each in errors]
    assert params == ["prompt", "unknown", "stream", "size"]


def test_error_of_a_line_of_an_own_route_is_a_problem_document(batches: Batches) -> None:
    batch = batches.end_of(batches.create([line("a", {"digit": 10}, "/generate")], "/generate"))
    assert (batch.status, batch.output_file_id) == ("completed", None)
    _, (error,) = batches.results(batch)
    assert error["response"]["status_code"] == error["response"]["body"]["status"] == 422
    assert error["response"]["body"]["code"] == "invalid_request"
    assert error["response"]["request_id"] == error["response"]["body"]["request_id"]


def test_at_most_100_errors_of_an_input_file_are_listed(batches: Batches) -> None:
    batch = batches.end_of(batches.create(jsonl(drawings(1)) + 200 * b"{}\n"))
    assert batch.status == "failed"
    assert batch.errors and batch.errors.data
    assert [each.line for each in batch.errors.data] == list(range(2, 102))


def test_file_has_the_uploaded_content_until_it_is_deleted(batches: Batches) -> None:
    content = b"any bytes \0\xff\r\n" * 300_000
    file = batches.upload(content, "Größe 7.jsonl", expires_after={"anchor": "created_at", "seconds": 7200})
    assert (file.filename, file.purpose, file.bytes) == ("Größe 7.jsonl", "batch", len(content))
    assert file.expires_at == file.created_at + 7200
    assert batches.client.files.retrieve(file.id) == file
    assert batches.client.files.content(file.id).content == content
    assert batches.client.files.delete(file.id).to_dict() == {"id": file.id, "object": "file", "deleted": True}
    for call in (batches.client.files.retrieve, batches.client.files.content, batches.client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(file.id)
    assert file.id not in {each.id for each in batches.client.files.list()}


def test_file_without_expires_after_expires_after_30_days(batches: Batches) -> None:
    file = batches.upload(drawings(1))
    assert file.expires_at == file.created_at + 30 * 24 * 3600


def test_files_are_listed_in_pages_in_both_orders(start_batches: StartBatches) -> None:
    batches = start_batches()
    ids = [batches.upload(drawings(1), f"{number}.jsonl").id for number in range(5)]
    files = batches.client.files
    assert [each.id for each in files.list(limit=2, order="asc")] == ids
    assert [each.id for each in files.list(limit=2)] == ids[::-1]
    assert [each.id for each in files.list(limit=2, purpose="batch", order="asc", after=ids[0])] == ids[1:]
    assert not files.list(purpose="batch_output").data
    batch = batches.end_of(batches.client.batches.create(input_file_id=ids[0], **CREATE))
    assert [each.id for each in files.list(purpose="batch_output")] == [batch.output_file_id]
    with pytest.raises(openai.BadRequestError) as refused:
        files.list(after=UNKNOWN_FILE)
    assert refused.value.param == "after"


def test_batches_are_listed_in_pages_with_the_newest_first(start_batches: StartBatches) -> None:
    batches = start_batches()
    file = batches.upload(drawings(1))
    created = [batches.client.batches.create(input_file_id=file.id, **CREATE) for _ in range(5)]
    ended = [batches.end_of(batch) for batch in created]
    assert list(batches.client.batches.list(limit=2)) == ended[::-1]
    assert list(batches.client.batches.list(after=ended[3].id)) == ended[2::-1]
    with pytest.raises(openai.BadRequestError) as refused:
        batches.client.batches.list(after=UNKNOWN_BATCH)
    assert refused.value.param == "after"


def test_files_of_results_expire_when_the_batch_says(batches: Batches) -> None:
    after: Any = {"anchor": "created_at", "seconds": 3600}
    batch = batches.end_of(batches.create(drawings(1), output_expires_after=after))
    assert batch.output_file_id
    file = batches.client.files.retrieve(batch.output_file_id)
    assert file.expires_at == file.created_at + 3600
    assert file.bytes == len(batches.client.files.content(file.id).content)


def test_cancelled_batch_keeps_its_answers_and_names_the_other_lines(batches: Batches) -> None:
    lines = [*(line(f"quick-{i}", {"digit": i, "num_steps": 1}, "/generate") for i in range(9)), *long_lines(200)]
    batch = batches.create(lines, "/generate")
    batches.wait_for_answers(batch, 9)
    running = batches.get(batch)
    assert running.model_extra
    assert running.model_extra["images_per_second"] > 0
    assert running.model_extra["seconds_left"] > 0
    assert batches.client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    batch = batches.end_of(batch)
    assert batch.status == "cancelled"
    assert batch.cancelling_at and batch.cancelled_at and batch.cancelling_at <= batch.cancelled_at
    assert batch.model_extra
    assert (batch.model_extra["images_per_second"], batch.model_extra["seconds_left"]) == (None, None)
    answers, errors = batches.results(batch)
    assert {each["custom_id"] for each in answers} >= {f"quick-{i}" for i in range(9)}
    assert sorted(each["custom_id"] for each in (*answers, *errors)) == sorted(each["custom_id"] for each in lines)
    assert {(each["response"], each["error"]["code"]) for each in errors} == {(None, "batch_cancelled")}
    batches.service.wait_until_idle()
    with pytest.raises(openai.ConflictError) as refused:
        batches.client.batches.cancel(batch.id)
    assert refused.value.code == "conflict"


def test_batch_that_has_completed_cannot_be_cancelled(batches: Batches) -> None:
    batch = batches.end_of(batches.create(drawings(1)))
    with pytest.raises(openai.ConflictError) as refused:
        batches.client.batches.cancel(batch.id)
    assert (refused.value.status_code, refused.value.code) == (409, "conflict")
    assert batches.get(batch) == batch


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"endpoint": "/v1/chat/completions"}, "endpoint"),
        ({"endpoint": "/v2/models/default/infer"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"input_file_id": UNKNOWN_FILE}, "input_file_id"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 60}}, "output_expires_after"),
        ({"extra_body": {"webhook_url": "https://example.com/"}}, "webhook_url"),
        ({"extra_body": {"unknown": 1}}, "unknown"),
    ],
)
def test_bad_request_error_of_a_batch_names_the_parameter(
    batches: Batches, options: dict[str, Any], param: str
) -> None:
    file = batches.upload(drawings(1))
    with pytest.raises(openai.BadRequestError) as refused:
        batches.client.batches.create(**{"input_file_id": file.id, **CREATE, **options})
    error = refused.value
    assert (error.code, error.type) == ("invalid_request", "invalid_request_error")
    assert error.param is not None and error.param.split(".")[0] == param
    assert not INTERNAL_DETAILS.search(error.response.text)


def test_bad_request_error_of_an_upload_names_the_parameter(batches: Batches) -> None:
    before = [each.id for each in batches.client.files.list()]
    for options, param in (
        ({"purpose": "fine-tune"}, "purpose"),
        ({"file": ("empty.jsonl", b"")}, "file"),
        ({"expires_after": {"anchor": "created_at", "seconds": 60}}, "expires_after[seconds]"),
    ):
        asked: dict[str, Any] = {"file": ("a.jsonl", jsonl(drawings(1))), "purpose": "batch", **options}
        with pytest.raises(openai.BadRequestError) as refused:
            batches.client.files.create(**asked)
        assert (refused.value.param, refused.value.code) == (param, "invalid_request")
    assert [each.id for each in batches.client.files.list()] == before


def test_unknown_files_and_batches_raise_not_found_error(batches: Batches) -> None:
    client = batches.client
    for call, unknown in (
        (client.files.retrieve, UNKNOWN_FILE),
        (client.files.content, UNKNOWN_FILE),
        (client.files.delete, UNKNOWN_FILE),
        (client.batches.retrieve, UNKNOWN_BATCH),
        (client.batches.cancel, UNKNOWN_BATCH),
    ):
        with pytest.raises(openai.NotFoundError) as missing:
            call(unknown)
        assert missing.value.code == "not_found"


def test_quota_raises_permission_denied_error_until_a_file_is_deleted(start_batches: StartBatches) -> None:
    batches = start_batches(UNFOG_MAX_FILES="2")
    first = batches.upload(drawings(1))
    batches.upload(drawings(1))
    with pytest.raises(openai.PermissionDeniedError) as refused:
        batches.upload(drawings(1))
    assert refused.value.code == "quota_exceeded"
    batches.client.files.delete(first.id)
    batches.upload(drawings(1))


def test_archive_has_the_images_of_the_answers(batches: Batches) -> None:
    batch = batches.end_of(batches.create([line(f"../{i}", {"prompt": "7", "n": 2, **FEW_STEPS}) for i in range(3)]))
    answers, _ = batches.results(batch)
    response = batches.service.client.get(f"/batches/{batch.id}/images.zip")
    assert response.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        names = [name for name in archive.namelist() if name.endswith(".png")]
        assert [archive.read(name) for name in names] == [png for answer in answers for png in png_of(answer)]
        index = [json.loads(each) for each in archive.read("metadata.jsonl").splitlines()]
    assert [each["file_name"] for each in index] == names
    seeds = [answer["response"]["body"]["seed"] for answer in answers for _ in range(2)]
    assert [each["seed"] for each in index] == seeds
    assert {each["label"] for each in index} == {"7"}


def test_archive_of_a_running_batch_has_the_images_so_far(batches: Batches) -> None:
    quick = [line(f"quick-{i}", {"digit": i, "num_steps": 1}, "/generate") for i in range(9)]
    batch = batches.create([*quick, *long_lines(200)], "/generate")
    batches.wait_for_answers(batch, 9)
    response = batches.service.client.get(f"/batches/{batch.id}/images.zip")
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        assert archive.testzip() is None
        assert len(archive.namelist()) >= 10
    batches.client.batches.cancel(batch.id)
    batches.end_of(batch)


@pytest.mark.parametrize("name", ARCHIVES)
def test_archive_of_images_that_were_deleted_gives_404(batches: Batches, name: str) -> None:
    batch = batches.end_of(batches.create(drawings(2)))
    assert batch.output_file_id
    batches.client.files.delete(batch.output_file_id)
    for batch_id, detail in ((batch.id, DELETED), (UNKNOWN_BATCH, NOT_FOUND)):
        for method in ("GET", "HEAD"):
            response = batches.service.client.request(method, f"/batches/{batch_id}/{name}")
            assert (response.status_code, response.headers["content-type"]) == (404, "application/problem+json")
            if method == "GET":
                assert (response.json()["code"], response.json()["detail"]) == ("not_found", detail)


@pytest.mark.parametrize("name", ARCHIVES)
def test_archive_of_images_that_are_deleted_meanwhile_is_never_complete(
    start_batches: StartBatches, tmp_path: Path, name: str
) -> None:
    batches = start_batches(UNFOG_DATA_DIR=str(tmp_path))
    batch = batches.end_of(batches.create(drawings(24)))
    assert batch.output_file_id
    # The archive becomes larger than a row group and the buffers of a connection. Any bytes are an image here.
    large = {"response": {"body": {"data": [{"b64_json": base64.b64encode(os.urandom(2**20)).decode()}]}}}
    with closing(sqlite3.connect(tmp_path / FILE, timeout=TIMEOUT)) as database, database:
        database.execute("UPDATE unfog_lines SET result = ?", (json.dumps(large).encode(),))
    with batches.service.client.stream("GET", f"/batches/{batch.id}/{name}") as response:
        assert response.status_code == 200
        parts = response.iter_raw()
        next(parts)
        batches.client.files.delete(batch.output_file_id)
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
            list(parts)


def test_interactive_requests_wait_for_at_most_one_step_of_a_batch(batches: Batches) -> None:
    service = batches.service
    batch = batches.create(drawings(3000))
    batches.wait_for_answers(batch, 1)
    before, answered = service.metrics(), num_answered(batches.get(batch))
    bodies = [{"digit": number, "seed": number, "num_steps": 10} for number in range(5)]
    images = [service.images(**body) for body in bodies]
    after = service.metrics()
    batch = batches.get(batch)
    assert batch.status == "in_progress"
    assert answered <= num_answered(batch) < 3000
    name = "admission_wait_steps"
    waits = after.value(f"{name}_count") - before.value(f"{name}_count")
    assert waits == 5, "lines of batches do not count"
    assert after.value(f"{name}_sum") - before.value(f"{name}_sum") <= 5
    batches.wait_for_answers(batch, num_answered(batch) + 1)
    batches.client.batches.cancel(batch.id)
    batches.end_of(batch)
    service.wait_until_idle()
    assert images == [service.images(**body) for body in bodies], "the same images as without a batch"


def test_metrics_count_lines_by_result_and_unfinished_batches(start_batches: StartBatches) -> None:
    batches = start_batches()
    service = batches.service
    service.wait_for(0, "unfinished_batches")
    batches.end_of(batches.create([*drawings(5), line("refused", {"prompt": "a cat"})]))
    service.wait_for(5, "batch_lines_total", result="completed")
    service.wait_for(1, "batch_lines_total", result="failed")
    running = batches.create(long_lines(200), "/generate")
    service.wait_for(1, "unfinished_batches")
    batches.client.batches.cancel(running.id)
    batches.end_of(running)
    service.wait_for(0, "unfinished_batches")
    assert service.metrics().value("batch_lines_total", result="completed") >= 5


class Receiver(HTTPServer):
    """A receiver of webhooks on 127.0.0.1."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/events"
        self.received: SimpleQueue[tuple[bytes, dict[str, str]]] = SimpleQueue()
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)

    def __enter__(self) -> "Receiver":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.put((body, dict(self.headers)))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_webhooks_are_verified_by_the_client_of_openai(start: Start, connect: Connect) -> None:
    with Receiver() as receiver:
        service = start(UNFOG_WEBHOOK_PRIVATE="on", UNFOG_WEBHOOK_HOSTS="127.0.0.1", UNFOG_WEBHOOK_SECRET=SECRET)
        batches = connect(service, webhook_secret=SECRET)
        asked: dict[str, Any] = {"extra_body": {"webhook_url": receiver.url}}
        cancelled = batches.create(long_lines(100), "/generate", **asked)
        batches.client.batches.cancel(cancelled.id)
        created = {
            "batch.completed": batches.create(drawings(2), **asked).id,
            "batch.failed": batches.create(b"no JSON\n", **asked).id,
            "batch.cancelled": cancelled.id,
        }
        received = [receiver.received.get(timeout=TIMEOUT) for _ in created]
    events = [batches.client.webhooks.unwrap(body, headers) for body, headers in received]
    assert {event.type: event.to_dict()["data"]["id"] for event in events} == created  # type: ignore[index]
    assert len({event.id for event in events}) == 3
    body, headers = received[0]
    with pytest.raises(openai.InvalidWebhookSignatureError):
        batches.client.webhooks.unwrap(body + b" ", headers)


def test_webhook_of_a_host_that_is_not_permitted_is_refused(start_batches: StartBatches) -> None:
    batches = start_batches(UNFOG_WEBHOOK_HOSTS="hooks.example.com", UNFOG_WEBHOOK_SECRET=SECRET)
    for url in ("http://127.0.0.1:9/", "http://hooks.example.com/", "https://example.com/"):
        with pytest.raises(openai.BadRequestError) as refused:
            batches.create(drawings(1), extra_body={"webhook_url": url})
        assert refused.value.param == "webhook_url"


def test_javascript_client_uploads_polls_downloads_and_cancels(batches: Batches, node_modules: Path) -> None:
    lines: list[Line] = drawings(6)
    (node_modules / "lines.jsonl").write_bytes(jsonl(lines))
    (node_modules / "long.jsonl").write_bytes(jsonl(long_lines(200)))
    asked = {"url": batches.service.url, "lines": "lines.jsonl", "long": "long.jsonl", "unknown": UNKNOWN_BATCH}
    command = ["node", "openai_batches.js", json.dumps(asked)]
    done = subprocess.run(command, cwd=node_modules, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["file"]["purpose"], found["file"]["bytes"]) == ("batch", len(jsonl(lines)))
    assert found["file"]["expires_at"] == found["file"]["created_at"] + 3600
    assert found["batch"]["request_counts"] == {"total": 6, "completed": 6, "failed": 0}
    answers = [json.loads(each) for each in found["output"].splitlines()]
    assert [each["custom_id"] for each in answers] == [each["custom_id"] for each in lines]
    for answer, asked_line in zip(answers, lines, strict=True):
        seed = answer["response"]["body"]["seed"]
        assert seed == asked_line["body"].get("seed", seed)
        number = int(asked_line["body"]["prompt"])
        expected = batches.service.post({"digit": number, "seed": seed, "num_steps": 10, "sampler": "dpmpp"})
        assert png_of(answer) == pngs(expected)
    assert found["listedFile"]
    assert found["listedBatch"]
    assert found["deleted"]["deleted"] is True
    assert found["cancelling"] in ("cancelling", "cancelled")
    assert {name: (error["name"], error["code"]) for name, error in found["errors"].items()} == {
        "batch": ("NotFoundError", "not_found"),
        "file": ("NotFoundError", "not_found"),
        "purpose": ("BadRequestError", "invalid_request"),
        "endpoint": ("BadRequestError", "invalid_request"),
        "cancel": ("ConflictError", "conflict"),
    }
    assert (found["errors"]["purpose"]["param"], found["errors"]["endpoint"]["param"]) == ("purpose", "endpoint")
    wait_until(lambda: batches.client.batches.list().data[0].status not in UNFINISHED, "the last batch has ended")
