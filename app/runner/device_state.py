"""Device state: the slots with the state of the images, the table of sampling plans, and the row indices of a step.

The docstring of app/engine/job.py explains slots, plans and evaluations. A trajectory has one slot and one row in each
step. A comparison whose classes have their own x_t has a slot for each class, and a row for each remaining class.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from app.engine.job import GUIDED_EVALUATIONS, Options, Trajectory
from app.runner.transfers import Transfers
from model.pipelines.schedulers import PipelinePlan
from model.sampler import COLUMN_OF_S, PLAN_COLUMNS, Plan
from model.spec import Process
from model.step import Rows, State

PADDING = 0  # the slot that padding rows use
# The initial size of the table of plans on a CPU. It holds the plans of /generate: every sampler with 1 to 100 steps.
FIRST_PLAN_ROWS = 16_384


class Slots:
    """The state of all started images of one model. Slot 0 is for padding.

    An index of the first dimension of the tensors is a slot. The number of slots doubles when all slots are in use.
    """

    def __init__(
        self,
        count: int,
        image_shape: tuple[int, int, int],
        device: torch.device,
        transfers: Transfers,
        num_labels: int = 11,
        kind: type[State] = State,
    ) -> None:
        """Starts with `count` free slots. `num_labels` is the number of classes plus the null label ("no class")."""
        self.state = kind.zeros(1 + count, image_shape, device)
        self.error = torch.zeros(1 + count, num_labels, device=device)  # (S, num_labels) errors of the last step
        self._free = list(range(PADDING + 1, 1 + count))
        self._transfers = transfers

    def begin(self, trajectories: list[Trajectory], **rows: Tensor) -> None:
        """Assigns slots to the trajectories and writes their state there. If this raises, no trajectory has a slot.

        `rows` are tensors with one row for each slot: first the `num_slots` rows of the first trajectory, and so on.
        """
        slots = self.next_slots(trajectories)
        places = self._transfers.upload(slots)
        self.write(places, **rows)
        self.assign(trajectories)

    def next_slots(self, trajectories: list[Trajectory]) -> list[int]:
        """Returns the slots that `assign` would assign to these trajectories now."""
        count = sum(trajectory.num_slots for trajectory in trajectories)
        while len(self._free) < count:
            self._grow()
        return self._free[-count:]

    def assign(self, trajectories: list[Trajectory]) -> None:
        """Assigns the result of `next_slots` to the trajectories."""
        each = iter(self.next_slots(trajectories))
        for trajectory in trajectories:
            trajectory.slots = tuple(islice(each, trajectory.num_slots))
            trajectory.first_slot = trajectory.slots[0]
        del self._free[-sum(trajectory.num_slots for trajectory in trajectories) :]

    def release(self, trajectories: list[Trajectory]) -> None:
        """Frees the slots of the trajectories."""
        for trajectory in trajectories:
            self._free += trajectory.slots
            trajectory.slots, trajectory.first_slot = (), -1

    def of(self, trajectories: list[Trajectory]) -> Tensor:
        """Returns the first slot (B,) of each trajectory that has slots."""
        return self._transfers.upload([trajectory.slots[0] for trajectory in trajectories if trajectory.slots])

    def write(self, slots: Tensor, **rows: Tensor) -> None:
        """Writes rows (B, ...) of the named tensors to the slots (B,), in place. Allocates no memory on the device."""
        for name, value in rows.items():
            getattr(self.state, name).index_copy_(0, slots, value)

    def write_errors(self, slots: Tensor, labels: Tensor, errors: Tensor) -> None:
        """Writes the errors (N,) of evaluations with these labels (N,) to the slots (N,) of their rows, in place."""
        self.error.index_put_((slots, labels), errors)

    def _grow(self) -> None:
        """Doubles the number of slots.

        Allocates all new tensors before it replaces the first one, because memory may run out in between.
        """
        size = len(self.state.seed)
        values = {field.name: getattr(self.state, field.name) for field in fields(self.state)}
        larger: dict[str, Any] = {
            name: None if rows is None else torch.cat([rows, torch.zeros_like(rows)]) for name, rows in values.items()
        }
        state = type(self.state)(**larger)
        error = torch.cat([self.error, torch.zeros_like(self.error)])
        self.state, self.error = state, error
        self._free += range(size, 2 * size)


class Plans:
    """The table (P, columns) of all sampling plans since the start. A plan has one row for each step.

    The columns are those of `Plan.table` in model/sampler.py, or of PipelinePlan. The size of the table doubles when it
    is full.
    """

    def __init__(self, device: torch.device, first_rows: int = FIRST_PLAN_ROWS, columns: int = PLAN_COLUMNS) -> None:
        """`first_rows` is the initial size of the table."""
        self.table = torch.zeros(first_rows, columns, device=device)  # (P, columns)
        self._starts: dict[tuple[str, str, int, tuple[int, ...]], int] = {}  # the key of a plan -> its first row
        # The first row of a plan -> the number of its steps up to the last one that adds noise.
        self.num_noisy: dict[int, int] = {}
        self.num_steps: dict[int, int] = {}  # the first row of a plan -> the number of its steps
        # The first row of a plan -> the factor of its first x_t, and a mask of the steps that add noise.
        self.first_x_t: dict[int, float] = {}
        self.is_noisy: dict[int, bytes] = {}
        self._num_rows = 0

    def start_of(self, options: Options, make: Callable[[Process, int, Sequence[int]], Plan | PipelinePlan]) -> int:
        """Returns the first row of the plan for these options. Adds the plan to the table if it is missing.

        `make` returns the plan for a process, a number of steps and a path.
        """
        key = (options.model, options.sampler, options.num_steps, options.path)
        if key not in self._starts:
            made = make(*key[1:])
            plan = made.table(torch.device("cpu"))  # (num_steps, columns)
            noisy = plan[:, COLUMN_OF_S].nonzero().flatten().tolist()
            start, stop = self._num_rows, self._num_rows + len(plan)
            while stop > len(self.table):
                self.table = torch.cat([self.table, torch.zeros_like(self.table)])
            self.table[start:stop] = plan
            self._starts[key], self._num_rows = start, stop
            self.num_steps[start] = len(plan)
            self.num_noisy[start] = 1 + noisy[-1] if noisy else 0
            self.first_x_t[start], self.is_noisy[start] = made.start, bytes((plan[:, COLUMN_OF_S] != 0).tolist())
        return self._starts[key]


def by_model(trajectories: Sequence[Trajectory]) -> dict[str, list[Trajectory]]:
    """Returns the trajectories of each model, in their order. The models are in the order of their first trajectory."""
    groups: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        groups.setdefault(trajectory.job.request.options.model, []).append(trajectory)
    return groups


Indices = tuple[list[int], list[int], list[int], list[int], list[int]]  # the fields of Rows in model/step.py


def rows_of(trajectories: Sequence[Trajectory], null_label: int, transfers: Transfers) -> Rows:
    """Returns the row indices for a call of one network, on the device."""
    parts = indices_of(trajectories, null_label)
    return Rows(*transfers.upload([index for part in parts for index in part]).split([len(part) for part in parts]))


def indices_of(trajectories: Sequence[Trajectory], null_label: int) -> Indices:
    """Returns the row indices for a call of one network.

    A row can have further evaluations with other labels. A guided row has one with the null label. A comparison whose
    classes share x_t has one row, with one evaluation for each remaining class.

    Example: three rows with the slots 7, 8 and 9, of which the second one is guided, have 4 evaluations. `slot` is
    [7, 8, 9, 8] and `second` is [0, 3, 2]: the unconditional evaluation of the second row is evaluation 3.
    """
    assert all(trajectory.slots for trajectory in trajectories), "indices_of() needs trajectories with slots"
    rows = [(slot, t.step, labels, t) for t in trajectories for slot, labels in labels_of(t, null_label)]
    slot, step, second = [slot for slot, _, _, _ in rows], [step for _, step, _, _ in rows], list(range(len(rows)))
    plan_row = [trajectory.first_plan_row + step for _, step, _, trajectory in rows]
    label = [labels[0] for _, _, labels, _ in rows]
    for place, (own_slot, _, labels, trajectory) in enumerate(rows):
        if len(labels) > 1:
            if not trajectory.comparison:
                second[place] = len(slot)
            num_further = len(labels) - 1
            slot += [own_slot] * num_further
            plan_row += [plan_row[place]] * num_further
            label += labels[1:]
    return slot, plan_row, label, [1 + own for own in step], second


def num_rows_of(trajectory: Trajectory) -> int:
    """Returns the number of rows that the trajectory has in the next step."""
    return trajectory.evaluations if trajectory.num_slots > 1 else 1


def labels_of(trajectory: Trajectory, null_label: int) -> list[tuple[int, Sequence[int]]]:
    """Returns the slot of each row that the trajectory has in the next step, and the labels of its evaluations."""
    slots, comparison = trajectory.slots, trajectory.comparison
    if comparison and comparison.has_own_images:
        return [(slots[label], (label,)) for label in comparison.remaining]
    if comparison:
        return [(slots[0], comparison.remaining)]
    label = null_label if trajectory.label is None else trajectory.label
    return [(slots[0], (label, null_label) if trajectory.network_evaluations == GUIDED_EVALUATIONS else (label,))]
