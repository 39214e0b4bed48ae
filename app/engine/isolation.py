"""Isolates the rows that make a batch fail, so that only their jobs fail."""

from collections.abc import Callable
from typing import TypeVar

from app.engine.interface import DeviceLostError, OutOfMemoryError
from app.engine.job import Trajectory

R = TypeVar("R")


def isolate(
    rows: list[Trajectory],
    compute: Callable[[list[Trajectory]], R],
    on_failure: Callable[[Trajectory, Exception], None],
    on_out_of_memory: Callable[[], None],
) -> list[tuple[list[Trajectory], R]]:
    """Returns the result for the rows. If a batch raises, computes its two halves instead, down to single rows.

    Each result comes with the rows of its batch. Calls `on_failure` with each row that fails alone, and
    `on_out_of_memory` at the first OutOfMemoryError. After a failure, it leaves out rows whose jobs are answered.
    DeviceLostError is not caught, because no row has caused it.

    Example: in a batch of 8 rows, row 5 fails. The batches are 0-7, 0-3, 4-7, 4-5, 4, 5 and 6-7. The result has those
    of 0-3, 4 and 6-7.
    """
    is_shortage_reported = False

    def run(rows: list[Trajectory]) -> list[tuple[list[Trajectory], R]]:
        nonlocal is_shortage_reported
        if not rows:
            return []
        try:
            return [(rows, compute(rows))]
        except DeviceLostError:
            raise
        except Exception as error:
            if isinstance(error, OutOfMemoryError) and not is_shortage_reported:
                is_shortage_reported = True
                on_out_of_memory()
            if len(rows) == 1:
                on_failure(rows[0], error)
                return []
        # After the `except` block, because the error refers to the tensors of the failed computation until its end.
        middle = len(rows) // 2
        return run(_open(rows[:middle])) + run(_open(rows[middle:]))

    return run(rows)


def _open(rows: list[Trajectory]) -> list[Trajectory]:
    return [trajectory for trajectory in rows if not trajectory.job.closed]
