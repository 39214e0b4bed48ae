"""The inputs of the graph of a step: which rows take the step, and which evaluations of the network they need."""

from dataclasses import dataclass

import numpy as np

from app.runner.graphs.device import Array
from app.runner.graphs.shapes import Shape, padded
from app.runner.loaded_model import LoadedModel

MOST_INPUTS = 1 << 16  # the largest number of integers of a call: two for each row and three for each evaluation
_ZEROS, _NUMBERS = np.zeros(MOST_INPUTS, dtype=np.int64), np.arange(MOST_INPUTS)


@dataclass(frozen=True, slots=True)
class Call:
    """A call of one network: B rows, their first evaluations, and further evaluations. Arrays are int64."""

    model: LoadedModel
    slot: Array  # (B + F,) slot of the row of each evaluation
    plan_row: Array  # (B + F,) row of the table of plans
    label: Array  # (B + F,) label of each evaluation
    step: Array  # (B,) number of the step of each row, minus SKIPPED (see new_rows.py)
    second: Array  # (B,) unconditional evaluation of a guided row, first evaluation of any other row
    has_known: bool

    @property
    def num_rows(self) -> int:
        """Returns B."""
        return len(self.second)

    @property
    def num_further(self) -> int:
        """Returns F."""
        return len(self.slot) - len(self.second)

    @property
    def shape(self) -> Shape:
        """Returns the smallest shape to which the call is padded."""
        return padded(self.num_rows, self.num_further, has_known=self.has_known)

    def inputs(self, shape: Shape) -> Array:
        """Returns the inputs of a graph of this shape, in the order of Rows in model/step.py.

        Padding rows and padding evaluations use the padding slot, the first row of the plans and the label 0.
        """
        count, more = self.num_rows, shape.rows - self.num_rows
        before, after = _ZEROS[:more], _ZEROS[: shape.further - self.num_further]
        parts = [
            *(
                part
                for of in (self.slot, self.plan_row, self.label)
                for part in (of[:count], before, of[count:], after)
            ),
            *(self.step, before),
            *(np.where(self.second < count, self.second, self.second + more), _NUMBERS[count : shape.rows]),
        ]
        return np.concatenate(parts)

    def increments(self, shape: Shape) -> Array:
        """Returns what each step of the same rows adds to the inputs: 1 to plan rows and steps, 0 to all others."""
        count, B, N = self.num_rows, shape.rows, shape.evaluations
        increments = np.zeros(3 * N + 2 * B, dtype=np.int64)
        for start, number in ((N, count), (N + B, self.num_further), (3 * N, count)):
            increments[start : start + number] = 1
        return increments


@dataclass(slots=True)
class PlainStep:
    """The inputs of a step without special rows. They are updated for each further step of the same rows."""

    sizes: Array  # `sizes` of the StepRows for which the inputs were computed
    first_step: int  # number of finished steps of the first row
    key: tuple[str, Shape]  # the key of the graph
    inputs: Array
    increments: Array  # what a step adds to the inputs
    is_exact: bool  # False if a larger graph is used

    def advance(self, first_step: int) -> None:
        """Changes the inputs to those of a later step."""
        self.inputs += (first_step - self.first_step) * self.increments
        self.first_step = first_step
