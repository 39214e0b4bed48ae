"""Isolates the rows that make a batch fail."""

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
    """Returns each row with its result. If a batch raises, runs its halves again until the failing row is alone.

    Calls `on_failure` with each failing row, and `on_out_of_memory` at most once. Leaves out rows whose job has been
    answered. Raises DeviceLostError at once, since no row has caused it.
    """
    is_short = False

    def run(rows: list[Trajectory]) -> list[tuple[Trajectory, R]]:
        nonlocal is_short
        rows = [trajectory for trajectory in rows if not trajectory.job.closed]
        if not rows:
            return []
        try:
            return list(zip(rows, compute(rows), strict=True))
        except DeviceLostError:
            raise
        except Exception as error:
            if isinstance(error, OutOfMemoryError) and not is_short:
                is_short = True
                on_out_of_memory()
            if len(rows) == 1:
                on_failure(rows[0], error)
                return []
            middle = len(rows) // 2
            return run(rows[:middle]) + run(rows[middle:])

    return run(rows)
