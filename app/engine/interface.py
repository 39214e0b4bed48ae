"""The runner protocol, and the isolation of rows that make a batch fail."""

from collections.abc import Callable
from typing import Protocol, TypeVar

from app.engine.job import Pixels, Trajectory
from app.engine.step_times import Pace
from app.runner.device import DeviceLostError, OutOfMemoryError
from app.runner.loaded_model import ModelInfo

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
        """Prepares for requests and measures the step times."""

    def check(self) -> None:
        """Draws the known picture of each model; raises if that fails or the picture differs."""


def isolate(
    rows: list[Trajectory],
    compute: Callable[[list[Trajectory]], list[R]],
    on_failure: Callable[[Trajectory, Exception], None],
    on_out_of_memory: Callable[[], None],
) -> list[tuple[Trajectory, R]]:
    """Returns each row with its result. Runs a batch that raises again in halves until the failing row is alone.

    Calls `on_failure` with each failing row, and `on_out_of_memory` at most once. Leaves out rows whose job has been
    answered. Raises DeviceLostError, which no row has caused.
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
