"""Large batches: they survive kills, and the memory of the service does not grow with them. Takes several minutes."""

import hashlib
import json
import random
import threading
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from openai.types import Batch

from tests.e2e.batch_client import Batches, Line, line, num_answered, png_of
from tests.e2e.conftest import StartBatches, start_service
from tests.e2e.process import wait_until
from tests.e2e.service import Service

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

MEGABYTE = 10**6
KILLS = 3
BYTES_OF_DIGEST = 120  # of a custom_id: an object of 16 bytes, and its place in a set
NUM_LINES, WARM_LINES = 100_000, 1000
PART = 200  # lines; a batch that does not answer so many within the time limit of `wait_until` does not progress


def resident_bytes(service: Service) -> int:
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    (line_of_memory,) = (each for each in status.splitlines() if each.startswith("VmRSS:"))
    return 1024 * int(line_of_memory.split()[1])


class Peak:
    """Finds the largest resident memory of a service within a block."""

    def __init__(self, service: Service) -> None:
        self._service, self._is_over = service, threading.Event()
        self._before = self._most = resident_bytes(service)
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    @property
    def growth(self) -> int:
        """The largest growth in bytes so far."""
        return self._most - self._before

    def _watch(self) -> None:
        while not self._is_over.wait(0.05):
            self._most = max(self._most, resident_bytes(self._service))


def end_of(batches: Batches, batch: Batch) -> Batch:
    """Waits until a large batch has ended, and checks that it does not stop to progress."""
    while (found := batches.get(batch)).status in ("validating", "in_progress"):
        assert found.request_counts
        batches.wait_for_answers(batch, min(num_answered(found) + PART, found.request_counts.total))
    return found


def test_10000_images_are_those_of_an_unbroken_run_after_three_kills(
    start_batches: StartBatches, tmp_path: Path
) -> None:
    bodies = ({"digit": i % 10, "count": 10, "num_steps": 4, "seed": i} for i in range(1000))
    lines = [line(f"line-{i}", body, "/generate") for i, body in enumerate(bodies)]
    unbroken = start_batches(UNFOG_MAX_BATCH="64")
    expected = digests(unbroken, end_of(unbroken, unbroken.create(lines, "/generate")))
    assert unbroken.service.stop() == 0
    variables, choose = {"UNFOG_MAX_BATCH": "64", "UNFOG_DATA_DIR": str(tmp_path)}, random.Random(0)
    batches = start_batches(**variables)
    batch = batches.create(lines, "/generate")
    for number in range(1, KILLS + 1):
        batches.wait_for_answers(batch, 250 * number - choose.randrange(100))
        batches.service.process.kill()
        batches = start_batches(**variables)
    batch = end_of(batches, batch)
    assert batch.model_extra and batch.model_extra["images"] == 10_000
    assert digests(batches, batch) == expected
    assert [name for name, _ in expected] == [each["custom_id"] for each in lines]


def digests(batches: Batches, batch: Batch) -> list[tuple[str, str]]:
    """Returns the custom_id and a digest of the images of each line."""
    assert batch.status == "completed"
    answers, errors = batches.results(batch)
    assert not errors
    return [(each["custom_id"], hashlib.sha256(b"".join(png_of(each))).hexdigest()) for each in answers]


@pytest.fixture(scope="module")
def instant(checkpoint: Path) -> Iterator[Batches]:
    """A service that computes nothing, so that many lines take little time."""
    with ExitStack() as stack:
        limits = {"UNFOG_MAX_LINES": str(NUM_LINES), "UNFOG_MAX_BATCH": "64"}
        service = start_service(stack, checkpoint, "tests.e2e.instant_service", **limits)
        yield stack.enter_context(closing(Batches(service)))


@dataclass(frozen=True)
class Large:
    """A batch of NUM_LINES that has ended, and the largest growth of the memory of the service in bytes."""

    batch: Batch
    growth: int  # since before the upload; the service had answered a batch of WARM_LINES
    growth_of_answers: int  # since WARM_LINES of this batch were answered


@pytest.fixture(scope="module")
def large(instant: Batches) -> Large:
    bodies = [{"digit": i % 10, "num_steps": 1} for i in range(NUM_LINES)]
    lines: list[Line] = [line(f"line-{i}", body, "/generate") for i, body in enumerate(bodies)]
    end_of(instant, instant.create(lines[:WARM_LINES], "/generate"))
    with Peak(instant.service) as peak:
        batch = instant.create(lines, "/generate")
        instant.wait_for(batch, {"in_progress"})
        instant.wait_for_answers(batch, WARM_LINES)
        with Peak(instant.service) as peak_of_answers:
            batch = end_of(instant, batch)
    return Large(batch, peak.growth, peak_of_answers.growth)


def test_memory_does_not_grow_with_the_answered_lines_of_a_batch(large: Large) -> None:
    assert large.batch.status == "completed"
    assert num_answered(large.batch) == NUM_LINES
    print(f"growth from {WARM_LINES} to {NUM_LINES} answers: {large.growth_of_answers / MEGABYTE:.1f} MB")
    assert large.growth_of_answers <= 20 * MEGABYTE


def test_validation_of_a_batch_keeps_little_more_than_the_digests_of_its_lines(large: Large) -> None:
    print(f"growth with the validation: {large.growth / MEGABYTE:.1f} MB")
    assert large.growth <= 20 * MEGABYTE + NUM_LINES * BYTES_OF_DIGEST


def test_results_are_downloaded_in_little_memory(instant: Batches, large: Large) -> None:
    batch = large.batch
    with Peak(instant.service) as peak:
        number = 0
        path = f"/v1/files/{batch.output_file_id}/content"
        with instant.service.client.stream("GET", path) as response:
            for text in response.iter_lines():
                assert json.loads(text)["custom_id"] == f"line-{number}"
                number += 1
    assert number == NUM_LINES
    print(
        f"growth during a download of {response.num_bytes_downloaded / MEGABYTE:.0f} MB: {peak.growth / MEGABYTE:.1f}"
    )
    assert peak.growth <= 20 * MEGABYTE


def test_archive_of_all_images_is_downloaded_in_little_memory(instant: Batches, large: Large, tmp_path: Path) -> None:
    batch = large.batch
    path = tmp_path / "images.zip"
    with (
        Peak(instant.service) as peak,
        path.open("wb") as file,
        instant.service.client.stream("GET", f"/batches/{batch.id}/images.zip") as response,
    ):
        for block in response.iter_bytes():
            file.write(block)
    print(f"growth during an archive of {path.stat().st_size / MEGABYTE:.0f} MB: {peak.growth / MEGABYTE:.1f} MB")
    with zipfile.ZipFile(path) as archive:
        assert len(archive.namelist()) == NUM_LINES + 1  # with the index
        assert archive.testzip() is None
    assert peak.growth <= 20 * MEGABYTE


def test_upload_of_200_megabytes_needs_little_memory(instant: Batches) -> None:
    part, size = b"x" * MEGABYTE, 200 * MEGABYTE
    head = b'--bound\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    head += b'--bound\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'

    def body() -> Iterator[bytes]:
        yield head
        for _ in range(size // MEGABYTE):
            yield part
        yield b"\r\n--bound--\r\n"

    headers = {"content-type": "multipart/form-data; boundary=bound"}
    warm = head + part + b"\r\n--bound--\r\n"
    assert instant.service.client.post("/v1/files", content=warm, headers=headers).status_code == 200
    with Peak(instant.service) as peak:
        response = instant.service.client.post("/v1/files", content=body(), headers=headers)
    assert response.json()["bytes"] == size
    print(f"growth during an upload of 200 MB: {peak.growth / MEGABYTE:.1f} MB")
    assert peak.growth <= 20 * MEGABYTE
    file_id = response.json()["id"]
    with Peak(instant.service) as peak, instant.service.client.stream("GET", f"/v1/files/{file_id}/content") as found:
        assert sum(len(block) for block in found.iter_bytes()) == size
    print(f"growth during its download: {peak.growth / MEGABYTE:.1f} MB")
    assert peak.growth <= 20 * MEGABYTE
    instant.client.files.delete(file_id)
    wait_until(lambda: file_id not in {each.id for each in instant.client.files.list()}, "the file is deleted")
