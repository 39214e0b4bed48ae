"""POST and GET /v1/batches, and both APIs in the OpenAPI document."""

import json
import threading
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import openai
import pytest
from jsonschema import Draft202012Validator
from openai.types import Batch as OpenAIBatch
from pydantic import BaseModel

from app import errors
from app.api.openai import batches as routes
from app.api.openai import files
from app.api.openai.batch_schemas import MAX_KEY, MAX_PAIRS, MAX_URL, MAX_VALUE, BatchList, BatchObject, FileList
from app.batches.batches import NO_FILE, NOT_FOUND
from app.batches.records import Batch, BatchError, BatchStatus
from app.main import create_app
from app.settings import Settings
from tests.app.api.openai.batch_samples import GENERATIONS, KEYS, LINES, OTHER_KEY, Application, check, idle, line
from tests.app.api.openai.samples import error_of

__all__ = ["idle"]
ENDED = ("completed", "failed", "expired", "cancelled")
BATCH = Batch(
    id="batch_1",
    owner="",
    endpoint=GENERATIONS,
    input_file_id="file-1",
    status=BatchStatus.FAILED,
    metadata={"a": "b"},
    errors=(),
    **dict(
        zip(
            ("created_at", "expires_at", *(f"{name}_at" for name in ("in_progress", "finalizing", "completed"))),
            range(1, 6),
            strict=True,
        )
    ),
    **{f"{name}_at": i for i, name in enumerate(("failed", "expired", "cancelling", "cancelled"), 6)},
    output_file_id="file-2",
    error_file_id="file-3",
    total=9,
    completed=5,
    failed=3,
    images=50,
    images_per_second=2.5,
    seconds_left=0.4,
)


def test_object_has_all_fields_of_openai_and_own_ones() -> None:
    described = BatchObject.of(BATCH).model_dump(mode="json")
    own = {"images", "images_per_second", "seconds_left"}
    assert set(described) == set(OpenAIBatch.model_fields) | own
    assert described["request_counts"] == {"total": 9, "completed": 5, "failed": 3}
    fixed = {"object": "batch", "completion_window": "24h", "errors": None, "model": None, "usage": None}
    same = set(described) - {"request_counts", *fixed}
    assert {name: described[name] for name in same} == {name: getattr(BATCH, name) for name in same}
    assert {name: described[name] for name in fixed} == fixed


def test_object_lists_errors_in_the_format_of_openai() -> None:
    found = (BatchError("invalid_json", 3, "The line is not JSON"), BatchError("unknown_field", 4, "Unknown", "urls"))
    assert BatchObject.of(replace(BATCH, errors=found)).model_dump()["errors"] == {
        "object": "list",
        "data": [
            {"code": "invalid_json", "line": 3, "message": "The line is not JSON", "param": None},
            {"code": "unknown_field", "line": 4, "message": "Unknown", "param": "urls"},
        ],
    }


async def ended(app: Application, batch_id: str) -> OpenAIBatch:
    """Returns a batch when it has ended."""
    while (batch := await app.openai.batches.retrieve(batch_id)).status not in ENDED:
        pass
    return batch


def test_client_of_openai_gets_the_answers_of_all_lines(tmp_path: Path) -> None:
    async def checks(app: Application) -> None:
        content = LINES + line("wrong", prompt="none")
        file = await app.openai.files.create(file=("lines.jsonl", content), purpose="batch")
        created = await app.openai.batches.create(
            input_file_id=file.id,
            endpoint=GENERATIONS,
            completion_window="24h",
            metadata={"set": "digits"},
            output_expires_after={"anchor": "created_at", "seconds": 7200},
        )
        assert (created.object, created.input_file_id, created.endpoint) == ("batch", file.id, GENERATIONS)
        batch = await ended(app, created.id)
        assert (batch.status, batch.metadata) == ("completed", {"set": "digits"})
        assert batch.request_counts is not None
        assert batch.request_counts.to_dict() == {"total": 4, "completed": 3, "failed": 1}
        assert batch.model_extra is not None
        assert batch.model_extra["images"] == 3
        for file_id, ids in ((batch.output_file_id, {"line 0", "line 1", "line 2"}), (batch.error_file_id, {"wrong"})):
            assert file_id is not None
            described = await app.openai.files.retrieve(file_id)
            assert described.purpose == "batch_output"
            assert described.expires_at == described.created_at + 7200
            results = (await app.openai.files.content(file_id)).content
            assert len(results) == described.bytes
            lines = [json.loads(line) for line in results.splitlines()]
            assert {line["custom_id"] for line in lines} == ids
            assert {line["response"]["status_code"] for line in lines} == {400 if ids == {"wrong"} else 200}
        assert {each.purpose async for each in app.openai.files.list()} == {"batch", "batch_output"}

    check(checks, tmp_path)


def test_batch_with_an_invalid_file_names_its_lines(tmp_path: Path) -> None:
    async def checks(app: Application) -> None:
        batch = await ended(app, await app.batch(LINES + b"{}"))
        assert batch.status == "failed"
        assert batch.errors is not None
        assert batch.errors.data is not None
        assert [error.line for error in batch.errors.data] == [4]
        error = error_of(await app.client.post(f"/v1/batches/{batch.id}/cancel"), 409, "conflict")
        assert "failed" in error["message"]

    check(checks, tmp_path)


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("body", [b"", b"{}"])
def test_cancelled_batch_has_ended(tmp_path: Path, body: bytes) -> None:
    async def checks(app: Application) -> None:
        batch_id = await app.batch()
        cancelled = await app.client.post(f"/v1/batches/{batch_id}/cancel", content=body)
        assert cancelled.status_code == 200
        assert cancelled.json()["status"] == "cancelled"
        assert (await app.client.get(f"/v1/batches/{batch_id}")).json() == cancelled.json()

    check(checks, tmp_path)


@pytest.mark.usefixtures("idle")
def test_client_of_openai_cancels_a_batch_in_progress(tmp_path: Path) -> None:
    async def checks(app: Application) -> None:
        batch_id = await app.batch()
        await app.batches.database.run(app.batches.batches.validate, batch_id)
        assert (await app.openai.batches.retrieve(batch_id)).status == "in_progress"
        cancelled = await app.openai.batches.cancel(batch_id)
        assert (cancelled.status, cancelled.request_counts and cancelled.request_counts.total) == ("cancelling", 3)
        assert cancelled.cancelling_at is not None

    check(checks, tmp_path)


@pytest.mark.usefixtures("idle")
def test_work_on_batches_is_woken_after_a_change_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def checks(app: Application) -> None:
        woken: list[str] = []
        for action in ("create", "cancel"):
            method = getattr(app.batches.batches, action)

            def changed(*arguments: Any, name: str = action, method: Any = method) -> Any:
                result = method(*arguments)
                woken.append(name)
                return result

            monkeypatch.setattr(app.batches.batches, action, changed)
        monkeypatch.setattr(type(app.batches), "wake", lambda batches: woken.append("wake"))
        batch_id = await app.batch()
        await app.client.get("/v1/batches")
        await app.client.post(f"/v1/batches/{batch_id}/cancel")
        await app.client.post(f"/v1/batches/{batch_id}/cancel")
        await app.create("file-unknown")
        assert woken == ["create", "wake", "cancel", "wake"]

    check(checks, tmp_path)


@pytest.mark.usefixtures("idle")
def test_client_of_openai_lists_all_pages(tmp_path: Path) -> None:
    async def checks(app: Application) -> None:
        file_id = await app.upload()
        ids = [(await app.create(file_id)).json()["id"] for _ in range(5)]
        pages = [page async for page in (await app.openai.batches.list(limit=2)).iter_pages()]
        assert [len(page.data) for page in pages] == [2, 2, 1]
        assert [each.id for page in pages for each in page.data] == ids[::-1]
        listed = (await app.client.get("/v1/batches")).json()
        assert (listed["first_id"], listed["last_id"], listed["has_more"]) == (ids[4], ids[0], False)

    check(checks, tmp_path)


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize(("path", "page"), [(files.FILES_PATH, FileList), (routes.BATCHES_PATH, BatchList)])
def test_page_of_a_list_and_its_json_are_not_made_in_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, page: type[BaseModel]
) -> None:
    threads = dict[str, threading.Thread]()

    def record(name: str) -> None:
        method = getattr(page, name)

        def recorded(*arguments: Any, **options: Any) -> Any:
            threads[name] = threading.current_thread()
            return method(*arguments, **options)

        monkeypatch.setattr(page, name, recorded)

    record("of")
    record("model_dump_json")

    async def checks(app: Application) -> None:
        await app.batch()
        answer = await app.client.get(path)
        assert (len(answer.json()["data"]), answer.headers["content-type"]) == (1, "application/json")
        assert set(threads) == {"of", "model_dump_json"}
        assert threading.current_thread() not in threads.values()

    check(checks, tmp_path)


def test_empty_list_has_no_ends(tmp_path: Path) -> None:
    async def checks(app: Application) -> None:
        empty = (await app.client.get("/v1/batches")).json()
        assert empty == {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}

    check(checks, tmp_path)


@pytest.mark.usefixtures("idle")
def test_optional_fields_may_be_null(tmp_path: Path) -> None:
    async def checks(app: Application) -> None:
        nulls = dict.fromkeys(("metadata", "output_expires_after", "webhook_url"))
        answer = await app.create(await app.upload(), **nulls)
        assert answer.status_code == 200
        assert answer.json()["metadata"] is None

    check(checks, tmp_path)


@pytest.mark.usefixtures("idle")
def test_largest_metadata_is_kept(tmp_path: Path) -> None:
    async def checks(app: Application) -> None:
        metadata = {f"{i:02}".ljust(MAX_KEY, "é"): "é\x00\n" + "a" * (MAX_VALUE - 3) for i in range(MAX_PAIRS)}
        answer = await app.create(await app.upload(), metadata=metadata)
        assert answer.json()["metadata"] == metadata

    check(checks, tmp_path)


EXPIRES = {"anchor": "created_at", "seconds": 3600}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"input_file_id": "file-unknown"}, "input_file_id"),
    ({"input_file_id": "file\x00"}, "input_file_id"),
    ({"input_file_id": ""}, "input_file_id"),
    ({"input_file_id": 1}, "input_file_id"),
    ({"endpoint": "/v1/chat/completions"}, "endpoint"),
    ({"endpoint": "/v1/files"}, "endpoint"),
    ({"completion_window": "48h"}, "completion_window"),
    ({"completion_window": None}, "completion_window"),
    ({"metadata": {str(i): "a" for i in range(MAX_PAIRS + 1)}}, "metadata"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"metadata": {"a": "a" * (MAX_VALUE + 1)}}, "metadata.a"),
    ({"metadata": {"a" * (MAX_KEY + 1): "a"}}, f"metadata.{'a' * (MAX_KEY + 1)}.[key]"),
    ({"metadata": []}, "metadata"),
    ({"output_expires_after": {}}, "output_expires_after.anchor"),
    ({"output_expires_after": EXPIRES | {"seconds": 3599}}, "output_expires_after.seconds"),
    ({"output_expires_after": EXPIRES | {"seconds": 2_592_001}}, "output_expires_after.seconds"),
    ({"output_expires_after": EXPIRES | {"anchor": "completed_at"}}, "output_expires_after.anchor"),
    ({"output_expires_after": EXPIRES | {"second": 1}}, "output_expires_after.second"),
    ({"webhook_url": "https://example.com/"}, "webhook_url"),  # no host is permitted by default
    ({"webhook_url": "https://example.com/" + "a" * MAX_URL}, "webhook_url"),
    ({"meta_data": {}}, "meta_data"),
]


# Values that only the service refuses, because they depend on its settings and on the files.
UNKNOWN = {"file-unknown", "/v1/files", "/v1/chat/completions", "https://example.com/"}


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize(("fields", "param"), REFUSED)
def test_wrong_field_is_named(tmp_path: Path, fields: dict[str, Any], param: str) -> None:
    async def checks(app: Application) -> None:
        answer = await app.create(await app.upload(), **fields)
        assert error_of(answer, 400, "invalid_request")["param"] == param
        assert (await app.client.get("/v1/batches")).json()["data"] == []

    check(checks, tmp_path)


def test_mistyped_field_of_a_nested_object_gets_a_hint(tmp_path: Path) -> None:
    async def checks(app: Application) -> None:
        answer = await app.create("file-1", output_expires_after=EXPIRES | {"second": 1})
        assert "Did you mean seconds?" in error_of(answer, 400, "invalid_request")["message"]

    check(checks, tmp_path)


def test_unknown_file_is_explained_to_the_client_of_openai(tmp_path: Path) -> None:
    async def checks(app: Application) -> None:
        with pytest.raises(openai.BadRequestError, match=NO_FILE) as raised:
            await app.openai.batches.create(input_file_id="file-unknown", endpoint=GENERATIONS, completion_window="24h")
        assert raised.value.param == "input_file_id"

    check(checks, tmp_path)


@pytest.mark.parametrize(
    ("content", "content_type", "status", "code"),
    [
        (b"{", "application/json", 400, "malformed_json"),
        (b"[]", "application/json", 400, "invalid_request"),
        (b"{}", "text/plain", 415, "unsupported_media_type"),
        (b"{" + b" " * 20_000 + b"}", "application/json", 413, "body_too_large"),
    ],
)
def test_body_that_is_not_a_request_is_refused(
    tmp_path: Path, content: bytes, content_type: str, status: int, code: str
) -> None:
    async def checks(app: Application) -> None:
        answer = await app.client.post("/v1/batches", content=content, headers={"content-type": content_type})
        error_of(answer, status, code)

    check(checks, tmp_path)


@pytest.mark.parametrize(("query", "param"), [("limit=0", "limit"), ("limit=101", "limit"), ("after=b", "after")])
def test_invalid_parameter_of_a_list_is_named(tmp_path: Path, query: str, param: str) -> None:
    async def checks(app: Application) -> None:
        error = error_of(await app.client.get(f"/v1/batches?{query}"), 400, "invalid_request")
        assert error["param"] == param

    check(checks, tmp_path)


@pytest.mark.usefixtures("idle")
def test_batch_of_another_key_is_answered_like_an_unknown_one(tmp_path: Path) -> None:
    async def checks(app: Application) -> None:
        app.client.headers.update(OTHER_KEY)
        file_id = await app.upload()
        own = (await app.create(file_id)).json()["id"]
        app.client.headers["authorization"] = "Bearer a-key-0123456789abcd"
        for batch_id in (own, "batch_unknown", "batch%00", "a" * 65):
            for method, suffix in (("GET", ""), ("POST", "/cancel")):
                answer = await app.client.request(method, f"/v1/batches/{batch_id}{suffix}")
                assert error_of(answer, 404, "not_found")["message"] == NOT_FOUND
        assert (await app.client.get("/v1/batches")).json()["data"] == []
        error_of(await app.client.get(f"/v1/batches?after={own}"), 400, "invalid_request")
        assert error_of(await app.create(file_id), 400, "invalid_request")["message"].endswith(NO_FILE)
        assert (await app.client.get(f"/v1/batches/{own}", headers=OTHER_KEY)).json()["status"] == "validating"

    check(checks, tmp_path, **KEYS)


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.StorageFull(), "storage_full"),
        (errors.StorageUnavailable(5), "storage_unavailable"),
        (errors.QuotaExceeded("Too many"), "quota_exceeded"),
    ],
)
def test_errors_of_the_database_are_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: errors.UnfogError, code: str
) -> None:
    async def checks(app: Application) -> None:
        def fail(*arguments: Any, **options: Any) -> Any:
            raise error

        for name in ("create", "get", "list", "cancel"):
            monkeypatch.setattr(app.batches.batches, name, fail)
        for answer in (
            await app.create("file-1"),
            await app.client.get("/v1/batches"),
            await app.client.get("/v1/batches/batch_1"),
            await app.client.post("/v1/batches/batch_1/cancel"),
        ):
            error_of(answer, error.status, code)
            assert answer.headers.get("retry-after") == error.headers.get("Retry-After")

    check(checks, tmp_path)


@cache
def document() -> dict[str, Any]:
    return create_app(Settings()).openapi()


OPERATIONS = [*files.router.operations, *routes.router.operations]
EVERYWHERE = {"unauthorized", "forbidden", "rate_limited", "internal_error", "storage_unavailable", "draining"}
BODY = {"request_timeout", "body_too_large", "storage_full"}
CODES = {
    "create_file": BODY
    | {"malformed_request", "invalid_request", "quota_exceeded", "unsupported_media_type", "overloaded"},
    "list_files": {"invalid_request"},
    "get_file": {"not_found"},
    "delete_file": {"not_found", "conflict", "storage_full"},
    "get_file_content": {"not_found"},
    "create_batch": BODY | {"malformed_json", "invalid_request", "quota_exceeded", "unsupported_media_type"},
    "list_batches": {"invalid_request"},
    "get_batch": {"not_found"},
    "cancel_batch": BODY | {"not_found", "conflict"},
}


def is_valid(schema: dict[str, Any], instance: Any) -> bool:
    return bool(Draft202012Validator({**schema, "components": document()["components"]}).is_valid(instance))


@pytest.mark.parametrize("name", CODES)
def test_document_has_an_example_of_every_error(name: str) -> None:
    (declared,) = [each for each in OPERATIONS if each.name == name]
    operation = document()["paths"][declared.path][declared.method.lower()]
    assert operation["operationId"] == name
    assert operation["security"] == [{}, {"bearer": []}, {"header": []}]
    codes = set()
    for status in set(operation["responses"]) - {"200", "431"}:  # The HTTP server sends 431.
        ((media_type, content),) = operation["responses"][status]["content"].items()
        assert media_type == "application/json"
        for code, example in content["examples"].items():
            assert is_valid(content["schema"], example["value"])
            assert example["value"]["error"]["code"] == code
            codes.add(code)
    assert codes == EVERYWHERE | CODES[name]


@pytest.mark.parametrize("name", CODES)
def test_examples_of_bodies_match_their_schemas(name: str) -> None:
    (declared,) = [each for each in OPERATIONS if each.name == name]
    operation = document()["paths"][declared.path][declared.method.lower()]
    for media_type, content in operation["responses"]["200"]["content"].items():
        assert media_type == "application/octet-stream" or is_valid(content["schema"], content["example"])
    for content in operation.get("requestBody", {}).get("content", {}).values():
        for example in content["examples"].values():
            assert is_valid(content["schema"], example["value"])
    assert ("requestBody" in operation) == (name in ("create_file", "create_batch"))


@pytest.mark.usefixtures("idle")
def test_service_accepts_exactly_the_batches_that_its_document_permits(tmp_path: Path) -> None:
    async def checks(app: Application) -> None:
        schema = {"$ref": "#/components/schemas/BatchRequest"}
        file_id = await app.upload()
        body = {"input_file_id": file_id, "endpoint": GENERATIONS, "completion_window": "24h"}
        for fields, _ in REFUSED:
            if UNKNOWN.isdisjoint(map(str, fields.values())):
                assert not is_valid(schema, body | fields), fields
        answer = await app.create(file_id, output_expires_after=EXPIRES | {"seconds": 3600.0})
        assert is_valid(schema, body | {"output_expires_after": EXPIRES | {"seconds": 3600.0}})
        described = document()["paths"]["/v1/batches"]["post"]["responses"]["200"]["content"]["application/json"]
        assert is_valid(described["schema"], answer.json())

    check(checks, tmp_path)
