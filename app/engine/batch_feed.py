"""Publishes the rows of the engine's steps, for GET /events/batch.

The receiver asks for one batch at a time, by setting `is_wanted`. The engine checks this attribute in each step. If it
is False, the engine does nothing else. Otherwise it copies only the values that later steps change. The receiver reads
all other values from the rows.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from app.engine.job import Job, Trajectory
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

    @classmethod
    def of(cls, step: int, waiting: int, running: int, jobs: Iterable[Job], selected: Sequence[Trajectory]) -> "Batch":
        """Returns the batch of these jobs. It copies the values of rows that later steps change."""
        rows = (
            (row, row.step, len(row.comparison.remaining) if row.comparison else 0)
            for job in jobs
            for row in job.unfinished
            if row.started
        )
        return cls(step, waiting, running, list(islice(rows, MAX_ROWS)), selected)


Receiver = Callable[[Batch | UnfogError], None]  # called in any thread; must not block


class BatchFeed:
    """Passes batches from the engine to one receiver."""

    def __init__(self) -> None:
        self.is_wanted = False  # True if the receiver wants the next batch
        self.receiver: Receiver | None = None

    def publish(self, batch: Batch) -> None:
        """Sends a batch to the receiver. `is_wanted` must be True."""
        self.is_wanted = False
        self._send(batch)

    def end(self, error: UnfogError) -> None:
        """Tells the receiver that no further batch is published."""
        self._send(error)

    def _send(self, message: Batch | UnfogError) -> None:
        if self.receiver:
            self.receiver(message)
