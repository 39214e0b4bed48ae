"""What the engine needs of a runner, and how a batch that fails is narrowed down to the guilty row."""

from collections.abc import Callable
from typing import Protocol, TypeVar

from app.device import DeviceLostError, OutOfMemoryError
from app.network import ModelInfo
from app.pace import Pace
from app.trajectory import Pixels, Trajectory

R = TypeVar("R")


class StepRunner(Protocol):
    """Computes; knows neither jobs nor threads. A call that raises has changed no row."""

    @property
    def models(self) -> dict[str, ModelInfo]:
        """What is served, by name; one is `default`."""

    @property
    def device_memory(self) -> Callable[[], int] | None:
        """Reads the bytes held on a GPU; None without one."""

    @property
    def network_seconds(self) -> float:
        """Time within the networks' calls until now."""

    def step(self, trajectories: list[Trajectory]) -> list[bool]:
        """One reverse step for each; True where its values are finite."""

    def pixels(self, trajectories: list[Trajectory]) -> list[Pixels]:
        """The images as they are predicted now."""

    def release(self, trajectories: list[Trajectory]) -> None:
        """Forgets their state."""

    def warm_up(self, should_stop: Callable[[], bool]) -> Pace:
        """Makes ready and measures the steps."""


def isolate(
    rows: list[Trajectory],
    compute: Callable[[list[Trajectory]], list[R]],
    on_failure: Callable[[Trajectory, Exception], None],
    on_out_of_memory: Callable[[int], None],
) -> list[tuple[Trajectory, R]]:
    """Each row with its result; a batch that raises is run again in halves until the guilty row stands alone.

    `on_failure` gets that row; `on_out_of_memory` gets the number of rows that may fit.
    Rows whose job was answered meanwhile are left out. A lost device is not the rows' fault: it raises.
    """
    rows = [trajectory for trajectory in rows if not trajectory.job.closed]
    if not rows:
        return []
    try:
        return list(zip(rows, compute(rows), strict=True))
    except DeviceLostError:
        raise
    except Exception as error:
        if len(rows) == 1:
            on_failure(rows[0], error)
            return []
        middle = len(rows) // 2
        if isinstance(error, OutOfMemoryError):
            on_out_of_memory(middle)
        halves = rows[:middle], rows[middle:]
        return [pair for half in halves for pair in isolate(half, compute, on_failure, on_out_of_memory)]
