"""Isolates the rows that make a batch fail, so that only their jobs fail."""

from collections.abc import Callable
from typing import TypeVar

from app.engine.interface import DeviceLostError, OutOfMemoryError
from app.engine.job import Trajectory

R = TypeVar("R")


def isolate(
    rows: list[Trajectory],
    compute: Callable[[list[Trajectory]], list[R]],
    on_failure: Callable[[Trajectory, Exception], None],
    on_out_of_memory: Callable[[], None],
) -> list[tuple[Trajectory, R]]:
    """Returns each row with its result. If a batch raises, computes its two halves instead, down to single rows.

    Calls `on_failure` with each row that fails alone, and `on_out_of_memory` at the first OutOfMemoryError. Leaves out
    rows whose jobs are answered. DeviceLostError is not caught, because no row has caused it.

    Example: in a batch of 8 rows, row 5 fails. The batches are 0-7, 0-3, 4-7, 4-5, 4, 5 and 6-7. Rows 0-4, 6 and 7 are
    returned.
    """
    is_shortage_reported = False

    def run(rows: list[Trajectory]) -> list[tuple[Trajectory, R]]:
        nonlocal is_shortage_reported
        rows = [trajectory for trajectory in rows if not trajectory.job.closed]
        if not rows:
            return []
        try:
            return list(zip(rows, compute(rows), strict=True))
        except DeviceLostError:
            raise
        except Exception as error:
            if isinstance(error, OutOfMemoryError) and not is_shortage_reported:
                is_shortage_reported = True
                on_out_of_memory()
            if len(rows) == 1:
                on_failure(rows[0], error)
                return []
            middle = len(rows) // 2
            return run(rows[:middle]) + run(rows[middle:])

    return run(rows)
