"""Batches while processes are killed or stopped, the disk is full, or the database is away."""

import json
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from hashlib import sha256
from pathlib import Path

import openai
import pytest
from openai.types import Batch

from tests.e2e.batch_client import Batches, Line, drawings, line, long_lines, num_answered, png_of
from tests.e2e.conftest import StartBatches, start_service
from tests.e2e.process import wait_until
from tests.e2e.service import assert_problem, pngs
from tests.postgresql import PostgreSQL

SHORT_LEASE = "tests.e2e.short_lease_service"
KILLS = 3
SEED_BITS = 53


@pytest.fixture
def start_batches(start_batches: StartBatches) -> StartBatches:
    """Returns a function that starts a service with large steps, which answer many lines in little time."""
    return partial(start_batches, UNFOG_MAX_BATCH="64")


@pytest.fixture(scope="module")
def unbroken(checkpoint: Path) -> Iterator[Batches]:
    """A service that is not interrupted."""
    with ExitStack() as stack:
        yield stack.enter_context(closing(Batches(start_service(stack, checkpoint, UNFOG_MAX_BATCH="64"))))


def seed_of(batch: Batch, number: int) -> int:
    """Returns the seed of a line without a seed: the first 53 bits of a digest."""
    bits = "".join(f"{byte:08b}" for byte in sha256(f"{batch.id}_{number}".encode()).digest())
    return int(bits[:SEED_BITS], 2)


def check_answers(batches: Batches, batch: Batch, lines: Sequence[Line], unbroken: Batches) -> None:
    """Checks that all lines have exactly one answer, with the images of a run without interruption."""
    assert batch.status == "completed"
    assert batch.request_counts and batch.request_counts.completed == len(lines)
    answers, errors = batches.results(batch)
    assert not errors
    assert [each["custom_id"] for each in answers] == [each["custom_id"] for each in lines]
    assert batch.model_extra and batch.model_extra["images"] == len(lines)
    seeds = [each["response"]["body"]["seed"] for each in answers]
    assert seeds == [each["body"].get("seed", seed_of(batch, i)) for i, each in enumerate(lines, 1)]
    seeded = [{**each, "body": {**each["body"], "seed": seed}} for each, seed in zip(lines, seeds, strict=True)]
    expected, _ = unbroken.results(unbroken.end_of(unbroken.create(seeded)))
    assert [png_of(each) for each in answers] == [png_of(each) for each in expected]


def wait_for_write(folder: Path) -> None:
    """Waits until the next transaction begins to be written."""
    log = folder / "batches.db-wal"
    before = log.stat()

    def has_changed() -> bool:
        after = log.stat()
        return (after.st_mtime_ns, after.st_size) != (before.st_mtime_ns, before.st_size)

    wait_until(has_changed, "a transaction is written")


def test_batch_completes_with_the_same_images_after_three_kills(
    start_batches: StartBatches, unbroken: Batches, tmp_path: Path
) -> None:
    choose, lines = random.Random(0), drawings(240)
    batches = start_batches(UNFOG_DATA_DIR=str(tmp_path))
    batch = batches.create(lines)
    for number in range(1, KILLS + 1):
        batches.wait_for_answers(batch, number * len(lines) // (KILLS + 2) + choose.randrange(12))
        wait_for_write(tmp_path)
        before = num_answered(batches.get(batch))
        batches.service.process.kill()
        batches = start_batches(UNFOG_DATA_DIR=str(tmp_path))
        after = batches.get(batch)
        assert (after.status, num_answered(after) >= before) == ("in_progress", True), "stored answers are kept"
    check_answers(batches, batches.end_of(batch), lines, unbroken)


def test_batch_is_validated_again_after_a_kill(start_batches: StartBatches, unbroken: Batches, tmp_path: Path) -> None:
    lines = drawings(20)
    batches = start_batches(UNFOG_DATA_DIR=str(tmp_path))
    batch = batches.create(lines)
    batches.service.process.kill()
    batches = start_batches(UNFOG_DATA_DIR=str(tmp_path))
    check_answers(batches, batches.end_of(batch), lines, unbroken)


def test_shutdown_does_not_wait_for_a_batch_which_continues_after_the_restart(
    start_batches: StartBatches, tmp_path: Path
) -> None:
    variables = {"UNFOG_DATA_DIR": str(tmp_path), "UNFOG_DRAIN_TIMEOUT": "3600"}
    batches = start_batches(**variables)
    quick = [line(f"quick-{i}", {"digit": i % 10, "num_steps": 5}, "/generate") for i in range(300)]
    batch = batches.create([*quick, *long_lines(300)], "/generate")
    batches.wait_for_answers(batch, 20)
    assert batches.service.stop() == 0  # It fails if this takes as long as the batch.
    assert "Traceback" not in "".join(batches.service.process.lines)
    batches = start_batches(**variables)
    stopped = batches.get(batch)
    assert stopped.status == "in_progress"
    assert 20 <= num_answered(stopped) < 600
    batches.wait_for_answers(batch, num_answered(stopped) + 1)
    batches.client.batches.cancel(batch.id)
    answers, errors = batches.results(batches.end_of(batch))
    assert len({each["custom_id"] for each in (*answers, *errors)}) == len(answers) + len(errors) == 600


def test_service_that_is_not_asked_for_batches_creates_no_database(start_batches: StartBatches, tmp_path: Path) -> None:
    batches = start_batches(UNFOG_DATA_DIR=str(tmp_path / "data"))
    assert batches.service.images(digit=7, num_steps=2)
    assert batches.service.stop() == 0
    assert not (tmp_path / "data").exists()


def test_shutdown_answers_interactive_requests_beside_a_batch(start_batches: StartBatches) -> None:
    batches = start_batches()
    batch = batches.create(long_lines(300), "/generate")
    batches.wait_for(batch, {"in_progress"})
    batches.service.wait_until_running()
    service = batches.service
    with service.events({"digit": 7, "num_steps": 100, "count": 64}) as events:
        assert next(events)[0] == "accepted"
        service.process.signal(signal.SIGTERM)
        assert [name for name, _ in events][-1] == "done"
    assert service.process.wait() == 0


def test_deleting_the_input_file_does_not_affect_the_batch(start_batches: StartBatches, unbroken: Batches) -> None:
    batches, lines = start_batches(), drawings(200)
    batch = batches.create(lines)
    batches.wait_for(batch, {"in_progress"})
    batches.client.files.delete(batch.input_file_id)
    assert num_answered(batches.get(batch)) < len(lines)
    check_answers(batches, batches.end_of(batch), lines, unbroken)


def test_second_service_with_the_same_folder_refuses_files_and_answers_other_requests(
    start_batches: StartBatches, tmp_path: Path
) -> None:
    first = start_batches(UNFOG_DATA_DIR=str(tmp_path))
    first.upload(drawings(1))
    second = start_batches(UNFOG_DATA_DIR=str(tmp_path))
    with pytest.raises(openai.InternalServerError) as refused:
        second.upload(drawings(1))
    assert (refused.value.status_code, refused.value.code) == (503, "storage_unavailable")
    assert int(refused.value.response.headers["retry-after"]) >= 1
    assert second.service.images(digit=7, num_steps=2)
    log = [json.loads(each) for each in second.service.process.lines]
    assert {"UNFOG_DATA_DIR cannot be used"} <= {each["message"] for each in log}
    assert first.service.stop() == 0
    second.upload(drawings(1))


def test_folder_that_cannot_be_created_only_affects_files_and_batches(
    start_batches: StartBatches, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    batches = start_batches(UNFOG_DATA_DIR=str(tmp_path / "file" / "folder"))
    for call in (batches.client.files.list, batches.client.batches.list):
        with pytest.raises(openai.InternalServerError) as refused:
            call()
        assert refused.value.code == "storage_unavailable"
    archive = batches.service.client.get("/batches/batch_0/images.zip")
    assert_problem(archive, 503, "storage_unavailable")
    assert batches.service.images(digit=7, num_steps=2)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Returns a folder on a file system of 8 MiB. Needs the right to mount it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("cannot mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_full_disk_refuses_uploads_and_delays_batches(
    start_batches: StartBatches, unbroken: Batches, small_disk: Path
) -> None:
    lines = drawings(300)
    batches = start_batches(SHORT_LEASE, UNFOG_DATA_DIR=str(small_disk))
    batch = batches.create(lines)
    batches.wait_for_answers(batch, 20)
    fill(small_disk / "ballast")
    with pytest.raises(openai.InternalServerError) as refused:
        batches.upload(2**20 * b"x")
    assert (refused.value.status_code, refused.value.code) == (507, "storage_full")
    service = batches.service
    wait_until(lambda: "Batches wait for the database" in "".join(service.process.lines), "the batch waits")
    assert service.images(digit=7, num_steps=2)
    assert service.client.get("/readyz").status_code == 200
    assert batches.get(batch).status == "in_progress"
    (small_disk / "ballast").unlink()
    check_answers(batches, batches.end_of(batch), lines, unbroken)


def fill(path: Path) -> None:
    """Writes to a file until the disk is full."""
    with path.open("wb", buffering=0) as file:
        for size in (2**16, 1):
            try:
                while True:
                    file.write(size * b"x")
            except OSError:
                continue


@pytest.fixture
def shared(start_batches: StartBatches, postgresql: PostgreSQL) -> Callable[[], Batches]:
    """Returns a function that starts a replica. All replicas have one database."""
    url = postgresql.new_schema()
    return lambda: start_batches(SHORT_LEASE, UNFOG_DATABASE_URL=url)


def test_replica_takes_the_lines_of_another_one_that_is_killed(
    shared: Callable[[], Batches], unbroken: Batches
) -> None:
    replicas = [shared() for _ in range(2)]
    lines = drawings(300)
    batch = replicas[0].create(lines)
    for each in replicas:
        wait_until(lambda each=each: answered_by(each) >= 20, "the replica has answered lines")  # type: ignore[misc]
    replicas[0].service.process.kill()
    assert num_answered(replicas[1].get(batch)) < len(lines)
    check_answers(replicas[1], replicas[1].end_of(batch), lines, unbroken)


def answered_by(batches: Batches) -> float:
    return batches.service.metrics().value("batch_lines_total", result="completed")


def test_replica_that_is_paused_within_a_transaction_does_not_block_the_others(
    shared: Callable[[], Batches], postgresql: PostgreSQL, unbroken: Batches
) -> None:
    paused, other = shared(), shared()
    lines = drawings(300)
    batch = paused.create(lines)
    wait_until(lambda: answered_by(paused) >= 20, "the first replica has answered lines")
    wait_until(lambda: is_paused_within_a_transaction(paused, postgresql), "a pause is within a transaction")
    ended = other.end_of(batch)
    check_answers(other, ended, lines, unbroken)
    os.kill(paused.service.process.pid, signal.SIGCONT)
    assert paused.end_of(batch) == ended
    assert paused.service.stop() == 0
    check_answers(other, other.get(batch), lines, unbroken)  # It could not store answers of lines that it had lost.


def is_paused_within_a_transaction(batches: Batches, postgresql: PostgreSQL) -> bool:
    """Pauses the service. Continues it, and returns False, unless it is within a transaction."""
    os.kill(batches.service.process.pid, signal.SIGSTOP)
    if postgresql.has_idle_transactions():
        return True
    os.kill(batches.service.process.pid, signal.SIGCONT)
    return False


def test_replica_cancels_the_batch_of_another_one(shared: Callable[[], Batches]) -> None:
    first, second = (shared() for _ in range(2))
    batch = first.create(long_lines(300), "/generate")
    first.wait_for(batch, {"in_progress"})
    first.service.wait_until_running()
    assert second.client.batches.cancel(batch.id).status == "cancelling"
    ended = second.end_of(batch)
    assert ended.status == "cancelled"
    assert len(second.lines_of(ended.error_file_id)) + len(second.lines_of(ended.output_file_id)) == 300
    for each in (first, second):
        each.service.wait_until_idle()


def test_database_that_is_away_delays_batches_and_refuses_other_calls(
    shared: Callable[[], Batches], postgresql: PostgreSQL, unbroken: Batches
) -> None:
    batches, lines = shared(), drawings(200)
    batch = batches.create(lines)
    batches.wait_for_answers(batch, 20)
    postgresql.stop()
    try:
        for call in (batches.client.files.list, lambda: batches.get(batch), lambda: batches.upload(lines)):
            with pytest.raises(openai.InternalServerError) as refused:
                call()
            assert (refused.value.status_code, refused.value.code) == (503, "storage_unavailable")
            assert int(refused.value.response.headers["retry-after"]) >= 1
        expected = pngs(unbroken.service.post({"digit": 7, "seed": 5, "num_steps": 5}))
        assert batches.service.images(digit=7, seed=5, num_steps=5) == expected
        assert batches.service.client.get("/readyz").status_code == 200
    finally:
        postgresql.start()
    check_answers(batches, batches.end_of(batch), lines, unbroken)


def test_service_starts_while_the_database_is_away(shared: Callable[[], Batches], postgresql: PostgreSQL) -> None:
    postgresql.stop()
    try:
        batches = shared()
        assert batches.service.images(digit=7, num_steps=2)
    finally:
        postgresql.start()
    wait_until(lambda: is_answered(batches), "the database answers again")
    assert batches.end_of(batches.create(drawings(3))).status == "completed"


def is_answered(batches: Batches) -> bool:
    try:
        return batches.client.files.list().data == []
    except openai.InternalServerError:
        return False
