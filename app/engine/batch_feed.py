"""Publishes the rows of the engine's steps, for GET /events/batch.

The receiver asks for one batch at a time, by setting `is_wanted`. The engine checks this attribute in each step. If it
is False, the engine does nothing else. Otherwise it copies only the values that later steps change. The receiver reads
all other values from the rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from app.engine.backlog import Backlog
from app.engine.job import Trajectory
from app.errors import UnfogError

MAX_ROWS = 256  # rows of a published batch


@dataclass(frozen=True, slots=True)
class Batch:
    """The running rows of all jobs at the beginning of a step, or of an idle engine."""

    step: int  # number of the step, from 1; for an idle engine the number of the last step
    waiting: int  # images before their first step
    running: int  # images between their first and last step
    # Each row, its number of finished steps, and the number of classes that it compares (0 for other rows).
    rows: list[tuple[Trajectory, int, int]]
    selected: Sequence[Trajectory]  # the rows of this step


Receiver = Callable[[Batch | UnfogError], None]  # called in any thread; must not block


class BatchFeed:
    """Passes batches from the engine to one receiver."""

    def __init__(self, backlog: Backlog) -> None:
        self.is_wanted = False  # True if the receiver wants the next batch
        self.receiver: Receiver | None = None
        self._backlog = backlog

    def publish(self, step: int, selected: Sequence[Trajectory]) -> None:
        """Sends the current batch to the receiver. `is_wanted` must be True. `selected` has the rows of this step."""
        self.is_wanted = False
        backlog = self._backlog
        running = (
            (row, row.step, len(row.comparison.remaining) if row.comparison else 0)
            for job in backlog.jobs
            for row in job.unfinished
            if row.started
        )
        self._send(Batch(step, backlog.waiting, backlog.running, list(islice(running, MAX_ROWS)), selected))

    def end(self, error: UnfogError) -> None:
        """Tells the receiver that no further batch is published."""
        self._send(error)

    def _send(self, message: Batch | UnfogError) -> None:
        if self.receiver:
            self.receiver(message)
