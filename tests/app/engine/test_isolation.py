import weakref

import pytest

from app.engine.interface import DeviceLostError, OutOfMemoryError
from app.engine.isolation import isolate
from app.engine.job import Trajectory
from tests.app.fakes import Rows, new_job


class Compute:
    """Doubles the index of each row. Raises if a failing row is in the batch or if the batch exceeds the limit."""

    def __init__(self, failing: set[int] | None = None, limit: int = 1000, error: Exception | None = None) -> None:
        self.failing, self.limit, self.error = failing or set(), limit, error or ValueError("failing")
        self.batches: list[list[int]] = []
        self.failed: list[tuple[int, Exception]] = []
        self.num_shortages = 0

    def __call__(self, rows: Rows) -> list[int]:
        self.batches.append([row.index for row in rows])
        if len(rows) > self.limit:
            raise OutOfMemoryError
        if self.failing & {row.index for row in rows}:
            raise self.error
        return [2 * row.index for row in rows]

    def fail(self, row: Trajectory, error: Exception) -> None:
        self.failed.append((row.index, error))
        row.job.fail(error)

    def count_shortage(self) -> None:
        self.num_shortages += 1

    def run(self, rows: Rows) -> list[tuple[int, int]]:
        batches = isolate(rows, self, self.fail, self.count_shortage)
        return [(row.index, result) for rows, results in batches for row, result in zip(rows, results, strict=True)]


def one_job_each(count: int) -> Rows:
    return [Trajectory(new_job(), index) for index in range(count)]


def test_batch_without_failing_rows_is_computed_once() -> None:
    compute = Compute()
    assert compute.run(one_job_each(5)) == [(index, 2 * index) for index in range(5)]
    assert compute.batches == [[0, 1, 2, 3, 4]]


def test_empty_batch_is_not_computed() -> None:
    compute = Compute()
    assert compute.run([]) == []
    assert compute.batches == []


def test_halves_are_computed_after_the_memory_of_the_failed_batch_is_free() -> None:
    class Memory:
        pass

    used: list[weakref.ref[Memory]] = []

    def compute(rows: Rows) -> int:
        memory = Memory()
        assert all(reference() is None for reference in used), "the error keeps the memory of the failed batch"
        used.append(weakref.ref(memory))
        if len(rows) > 1:
            raise OutOfMemoryError
        return rows[0].index

    batches = isolate(one_job_each(8), compute, lambda row, error: None, lambda: None)
    assert [index for _, index in batches] == list(range(8))
    assert len(used) == 15


@pytest.mark.parametrize("failing", [{0}, {6}, {3, 4}, {0, 2, 5}, set(range(7))])
def test_only_failing_rows_fail_and_the_others_are_computed_once(failing: set[int]) -> None:
    compute = Compute(failing)
    assert compute.run(one_job_each(7)) == [(index, 2 * index) for index in range(7) if index not in failing]
    assert compute.failed == [(index, compute.error) for index in sorted(failing)]
    succeeded = [index for batch in compute.batches if not failing & set(batch) for index in batch]
    assert len(set(succeeded)) == len(succeeded)


def test_other_rows_of_a_failed_job_are_not_computed_again() -> None:
    job = new_job(8)
    compute = Compute({0})
    assert compute.run(job.unfinished) == []
    assert compute.batches == [list(range(8)), [0, 1, 2, 3], [0, 1], [0]]


def test_rows_of_answered_jobs_are_left_out_after_a_failure() -> None:
    rows, compute = one_job_each(4), Compute({0})
    rows[1].job.fail(ValueError())
    assert compute.run(rows) == [(2, 4), (3, 6)]
    assert compute.batches == [[0, 1, 2, 3], [0], [2, 3]]


def test_batch_is_halved_until_it_fits_into_memory() -> None:
    compute = Compute(limit=2)
    assert compute.run(one_job_each(8)) == [(index, 2 * index) for index in range(8)]
    assert compute.failed == []
    assert compute.num_shortages == 1


def test_row_that_does_not_fit_into_memory_alone_fails() -> None:
    compute = Compute(limit=0)
    assert compute.run(one_job_each(2)) == []
    assert [index for index, _ in compute.failed] == [0, 1]


def test_lost_device_error_is_raised_and_no_row_fails() -> None:
    compute = Compute({1}, error=DeviceLostError("gone"))
    with pytest.raises(DeviceLostError):
        compute.run(one_job_each(4))
    assert len(compute.batches) == 1
    assert compute.failed == []
