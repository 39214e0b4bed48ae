"""Tests of GET /batches/{batch}/images.zip and GET /batches/{batch}/images.parquet."""

import base64
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from app.batches.batches import DELETED, ActiveBatch, Batches
from app.batches.files import result_pages
from app.batches.records import BatchStatus
from app.errors import StorageUnavailable
from tests.app.api.openai.batch_samples import GENERATIONS, KEYS, LINES, OTHER_KEY, Application, check, idle
from tests.scripts.extras import hide

__all__ = ["idle"]
pytestmark = pytest.mark.usefixtures("idle")

TYPES = {"zip": "application/zip", "parquet": "application/vnd.apache.parquet"}
FORMATS = list(TYPES)


async def answer_lines(app: Application, batch_id: str, count: int) -> None:
    """Does the work of a batch: answers its first `count` lines with the routes of the application."""
    run, batches = app.batches.database.run, app.batches.batches
    await run(batches.validate, batch_id)
    active = ActiveBatch(batch_id, GENERATIONS, BatchStatus.IN_PROGRESS, is_expired=False)
    for line in await run(batches.take, active, count):
        answer = await app.client._transport.app.state.lines.answer(line)
        await run(batches.store, [(line, answer)])


def test_archives_have_the_images_of_the_lines_that_are_finished(tmp_path: Path) -> None:
    async def checks(app: Application) -> None:
        batch = await app.batch()
        await answer_lines(app, batch, 2)
        sent = [json.loads(line)["body"] for line in LINES.splitlines()[:2]]
        answers = [(await app.client.post(GENERATIONS, json=body)).json() for body in sent]
        pngs = [base64.b64decode(answer["data"][0]["b64_json"]) for answer in answers]
        responses = {name: await app.client.get(f"/batches/{batch}/images.{name}") for name in FORMATS}
        for name, response in responses.items():
            assert (response.status_code, response.headers["content-type"]) == (200, TYPES[name])
            assert response.headers["content-disposition"] == f'attachment; filename="{batch}.{name}"'
            assert response.headers["cache-control"] == "no-store"
        with zipfile.ZipFile(io.BytesIO(responses["zip"].content)) as archive:
            assert archive.testzip() is None
            files = {name: archive.read(name) for name in archive.namelist()}
        index = [json.loads(line) for line in files.pop("metadata.jsonl").splitlines()]
        assert list(files.values()) == pngs
        assert index == [
            {"file_name": name, "custom_id": f"line {i}", "line": i + 1, "index": 0, "seed": i, "label": "7"}
            for i, name in enumerate(files)
        ]
        rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(responses["parquet"].content)).to_pylist()
        assert [row["image"]["bytes"] for row in rows] == pngs
        assert [{"file_name": row.pop("image")["path"], **row} for row in rows] == index

    check(checks, tmp_path)


def test_archives_of_a_batch_without_finished_lines_are_empty(tmp_path: Path) -> None:
    async def checks(app: Application) -> None:
        batch = await app.batch()
        content = (await app.client.get(f"/batches/{batch}/images.zip")).content
        assert zipfile.ZipFile(io.BytesIO(content)).namelist() == ["metadata.jsonl"]
        content = (await app.client.get(f"/batches/{batch}/images.parquet")).content
        assert pq.read_metadata(io.BytesIO(content)).num_rows == 0

    check(checks, tmp_path)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("batch", ["batch_0123456789abcdef01234567", "..%5C", "%00", "%C3%BC", "x" * 5000])
def test_unknown_batch_gives_404_with_a_problem_document(tmp_path: Path, name: str, batch: str) -> None:
    async def checks(app: Application) -> None:
        response = await app.client.get(f"/batches/{batch}/images.{name}")
        assert (response.status_code, response.headers["content-type"]) == (404, "application/problem+json")
        assert response.json()["detail"] == "No batch with this id exists"

    check(checks, tmp_path)


@pytest.mark.parametrize("name", FORMATS)
def test_batch_whose_output_file_was_deleted_gives_404(tmp_path: Path, name: str) -> None:
    async def checks(app: Application) -> None:
        batch = await app.batch()
        await answer_lines(app, batch, 3)
        await app.batches.database.run(app.batches.batches.end_if_done, batch)
        file = (await app.client.get(f"/v1/batches/{batch}")).json()["output_file_id"]
        assert (await app.client.head(f"/batches/{batch}/images.{name}")).status_code == 200
        await app.client.delete(f"/v1/files/{file}")
        assert (await app.client.head(f"/batches/{batch}/images.{name}")).status_code == 404
        response = await app.client.get(f"/batches/{batch}/images.{name}")
        assert (response.status_code, response.json()["detail"]) == (404, DELETED)

    check(checks, tmp_path)


@pytest.mark.parametrize("name", FORMATS)
def test_batch_of_another_key_gives_404(tmp_path: Path, name: str) -> None:
    async def checks(app: Application) -> None:
        app.client.headers["authorization"] = "Bearer a-key-0123456789abcd"
        url = f"/batches/{await app.batch()}/images.{name}"
        assert (await app.client.get(url)).status_code == 200
        assert (await app.client.get(url, headers=OTHER_KEY)).status_code == 404
        del app.client.headers["authorization"]
        assert (await app.client.get(url)).status_code == 401

    check(checks, tmp_path, **KEYS)


@pytest.mark.parametrize("name", FORMATS)
def test_head_returns_the_headers_of_get_without_reading_answers(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_reads = 0

    def counted(*arguments: Any) -> Iterator[Any]:
        nonlocal num_reads
        num_reads += 1
        yield from result_pages(*arguments)

    monkeypatch.setattr("app.batches.batches.result_pages", counted)

    async def checks(app: Application) -> None:
        url = f"/batches/{await app.batch()}/images.{name}"
        head = await app.client.head(url)
        assert (head.status_code, head.content, num_reads) == (200, b"", 0)
        get = await app.client.get(url)
        assert num_reads == 1
        of_connection = {"x-request-id"}
        assert {k: v for k, v in head.headers.items() if k not in of_connection} == {
            k: v for k, v in get.headers.items() if k not in of_connection
        }
        assert (await app.client.head(f"/batches/batch_0/images.{name}")).status_code == 404

    check(checks, tmp_path)


def test_parquet_without_pyarrow_gives_501(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def checks(app: Application) -> None:
        batch = await app.batch()
        hide("pyarrow", monkeypatch)
        response = await app.client.get(f"/batches/{batch}/images.parquet")
        assert (response.status_code, response.json()["code"]) == (501, "not_available")
        assert "pip install -e '.[parquet]'" in response.json()["detail"]
        assert (await app.client.get(f"/batches/{batch}/images.zip")).status_code == 200

    check(checks, tmp_path)


def test_database_that_does_not_answer_gives_503(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(self: Batches, owner: str, batch_id: str) -> None:
        raise StorageUnavailable(5)

    async def checks(app: Application) -> None:
        monkeypatch.setattr(Batches, "get", unavailable)
        response = await app.client.get("/batches/batch_0/images.zip")
        assert (response.status_code, response.headers["retry-after"]) == (503, "5")

    check(checks, tmp_path)
