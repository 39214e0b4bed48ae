"""The batch: the rows of the next step. It stays the same until rows join, leave or end.

The clock of the batch counts the steps of all rows at once. An array has the step at which the size of each row (its
number of evaluations, see job.py) changes. Python code runs only for the rows whose size changes, and for those that
join or leave.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import compress

import numpy as np
import numpy.typing as npt

from app.engine.job import STOPPED, Clock, IntArray, StepKind, StepRows, Trajectory

# The rows of the array: size of the next step, clock at which it changes, clock before the first step, place of the job
# in the backlog, and 1 for the tail of a job.
_SIZE, _CHANGES_AT, _FIRST, _PLACE, _IS_TAIL = range(5)
NEVER = 1 << 62
Calls = tuple[dict[str, int], dict[str, int]]  # of a step: evaluations by model, rows with CLIP guidance by model
FEW_ROWS = 4  # to remove more rows, one pass over the batch is faster than one search for each row


class Batch:
    """The rows that take the next step."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.rows: list[Trajectory] = []  # a new list after each change
        self._joined: list[Trajectory] = []
        self.size = 0  # sum of the sizes of the rows, in evaluations
        self.version = 0  # increases with each change
        self._array: IntArray = np.zeros((5, 0), dtype=np.int64)
        self._sizes: IntArray = np.zeros(0, dtype=np.int64)  # (B,) size of the next step of each row
        self._next_change = NEVER  # clock at which the size of a row changes

    def replace(self, rows: Sequence[Trajectory]) -> None:
        """Makes these rows the batch."""
        staying = set(rows)
        self.remove([row for row in self.rows if row not in staying])
        self.add([row for row in rows if row.clock is STOPPED])

    def add(self, rows: Sequence[Trajectory]) -> None:
        """Adds rows that are in no batch."""
        if not rows:
            return
        self._joined += rows
        now, columns = self.clock.steps, []
        for row in rows:
            row.follow(self.clock)
            job, step = row.job, row.step
            is_tail = row is job.unfinished[-1]
            columns.append((row.evaluations, now + _until_change(row), now - step, job.place, is_tail))
        self._set([*self.rows, *rows], np.concatenate([self._array, np.array(columns, dtype=np.int64).T], axis=1))

    def remove(self, rows: Collection[Trajectory]) -> None:
        """Removes rows, if they are in the batch."""
        leaving = {row for row in rows if row.clock is self.clock}
        if not leaving:
            return
        if len(leaving) <= FEW_ROWS:
            places = list(map(self.rows.index, leaving))
        else:
            places = [place for place, row in enumerate(self.rows) if row in leaving]
        self._remove_at(places)

    def step_rows(self) -> StepRows:
        """Returns the rows of the next step."""
        return StepRows(self.rows, self.clock.steps - self._array[_FIRST], self._sizes)

    def take_joined(self) -> list[Trajectory]:
        """Returns the rows that joined after the last call."""
        joined, self._joined = self._joined, []
        return joined

    def advance(self) -> list[Trajectory]:
        """Adds one step to each row. Removes and returns the rows that end or that compare the classes.

        A row that compares the classes joins again when its errors are known.
        """
        self.clock.steps += 1
        if self.clock.steps < self._next_change:
            return []
        places = np.flatnonzero(self._array[_CHANGES_AT] == self.clock.steps)
        changed = [self.rows[place] for place in places.tolist()]
        sizes = [row.evaluations for row in changed]
        self._array[_SIZE, places] = sizes
        self._array[_CHANGES_AT, places] = [self.clock.steps + _until_change(row) for row in changed]
        leaving = [
            place
            for place, row, size in zip(places.tolist(), changed, sizes, strict=True)
            if row.comparison or not size
        ]
        ended = [self.rows[place] for place in leaving]
        self._remove_at(leaving)
        return ended

    def decreases(self, num_places: int) -> npt.NDArray[np.float64]:
        """Returns what a step subtracts from the jobs, by their place in the backlog, (3, num_places).

        These are the evaluations of the job, and the evaluations and the steps of its tail.
        """
        size, place, tail = self._array[_SIZE], self._array[_PLACE], self._array[_IS_TAIL]
        return np.stack([np.bincount(place, weights, minlength=num_places) for weights in (size, size * tail, tail)])

    def calls(self, kind: StepKind) -> Calls:
        """Returns the evaluations of the network call of each model, and its number of rows with CLIP guidance.

        A step makes one network call for each model. `kind` is that of the jobs of the rows.
        """
        if len(kind.models) == 1 and not kind.has_clip:
            return {kind.models[0]: self.size}, {}
        evaluations, with_clip = Counter[str](), Counter[str]()
        for row in self.rows:
            model = row.job.request.options.model
            evaluations[model] += row.network_evaluations
            if row.clip:
                with_clip[model] += 1
        return evaluations, with_clip

    def _remove_at(self, places: list[int]) -> None:
        """Removes the rows at these places."""
        is_staying = np.ones(len(self.rows), dtype=np.bool_)
        is_staying[places] = False
        for place in places:
            self.rows[place].follow(STOPPED)
        self._set(list(compress(self.rows, is_staying.tolist())), self._array[:, is_staying])

    def _set(self, rows: list[Trajectory], array: IntArray) -> None:
        self.rows, self._array = rows, array
        self._changed()

    def _changed(self) -> None:
        self._sizes = self._array[_SIZE].copy()
        self.size = int(self._sizes.sum())
        self.version += 1
        self._next_change = int(self._array[_CHANGES_AT].min(initial=NEVER))


def _until_change(row: Trajectory) -> int:
    return 1 if row.comparison else row.job.sizes.until_change[row.step]
