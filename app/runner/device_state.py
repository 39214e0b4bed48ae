"""Device state: the slots with the state of the images, the table of sampling plans, and the row indices of a step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from app.engine.job import Options, Trajectory
from app.runner.transfers import Shapes, Transfers
from model.sampler import make_plan
from model.schedule import Schedule
from model.step import Rows, State

PADDING = 0  # the slot that padding rows use
# The initial size of the table of plans. It holds the plans of every sampler with 1 to 100 steps and need not grow,
# because a CUDA graph is valid for one size of its tensors only.
FIRST_PLAN_ROWS = 16_384


class Slots:
    """The state of all started images. Each row of its tensors is a slot, which is assigned to one trajectory.

    The number of slots doubles when all slots are in use.
    """

    def __init__(
        self, count: int, image_shape: tuple[int, int, int], device: torch.device, transfers: Transfers
    ) -> None:
        """Starts with `count` free slots."""
        self.state = State.zeros(1 + count, image_shape, device)
        self.finite = torch.ones(1 + count, dtype=torch.bool, device=device)  # (S,) True while all values are finite
        self._free = list(range(PADDING + 1, 1 + count))
        self._transfers = transfers

    def begin(self, trajectories: list[Trajectory], **rows: Tensor) -> None:
        """Assigns a slot to each trajectory and writes its state there. If this raises, no trajectory has a slot."""
        while len(self._free) < len(trajectories):
            self._grow()
        slots = self._free[-len(trajectories) :]
        places = self._transfers.upload(slots)
        finite = torch.ones(len(slots), dtype=torch.bool, device=self.finite.device)  # (B,)
        self.write(places, finite=finite, **rows)
        del self._free[-len(trajectories) :]
        for trajectory, slot in zip(trajectories, slots, strict=True):
            trajectory.slot = slot

    def release(self, trajectories: list[Trajectory]) -> None:
        """Frees the slots of the trajectories that have one."""
        for trajectory in trajectories:
            if trajectory.slot is not None:
                self._free.append(trajectory.slot)
                trajectory.slot = None

    def of(self, trajectories: list[Trajectory]) -> Tensor:
        """Returns the slots (B,) of the trajectories that have one."""
        return self._transfers.upload([trajectory.slot for trajectory in trajectories if trajectory.slot is not None])

    def finite_after(self, slots: Tensor, finite: Tensor) -> Tensor:
        """Returns (B,) True for each slot whose values were finite in all steps. `finite` is the flag of this step."""
        return self.finite[slots] & finite

    def write(self, slots: Tensor, **rows: Tensor) -> None:
        """Writes rows (B, ...) of the named tensors to the slots (B,), in place. Allocates no memory on the device."""
        for name, value in rows.items():
            rows_of_slots = self.finite if name == "finite" else getattr(self.state, name)
            rows_of_slots.index_copy_(0, slots, value)

    def _grow(self) -> None:
        """Doubles the number of slots.

        Allocates all new tensors before it replaces the first one, because memory may run out in between.
        """
        size = len(self.state.seed)
        state = State(*(torch.cat([rows, torch.zeros_like(rows)]) for rows in self.state))
        self.finite = torch.cat([self.finite, torch.ones_like(self.finite)])
        self.state = state
        self._free += range(size, 2 * size)


class Plans:
    """The table (P, 5) of all sampling plans in use. A plan has one row for each step.

    The columns are t, a, b, c, s (see model/sampler.py). The size of the table doubles when it is full.
    """

    def __init__(self, device: torch.device) -> None:
        self.table = torch.zeros(FIRST_PLAN_ROWS, 5, device=device)  # (P, 5)
        self._starts: dict[tuple[str, str, int], int] = {}  # (model, sampler, num_steps) -> first row of the plan
        self._num_rows = 0

    def start_of(self, options: Options, schedule: Schedule) -> int:
        """Returns the first row of the plan for these options. Adds the plan to the table if it is missing."""
        key = (options.model, options.sampler, options.num_steps)
        if key not in self._starts:
            plan = make_plan(schedule, options.sampler, options.num_steps).table(self.table.device)  # (num_steps, 5)
            start, stop = self._num_rows, self._num_rows + len(plan)
            while stop > len(self.table):
                self.table = torch.cat([self.table, torch.zeros_like(self.table)])
            self.table[start:stop] = plan
            self._starts[key], self._num_rows = start, stop
        return self._starts[key]


def rows_of(trajectories: Sequence[Trajectory], shapes: Shapes, transfers: Transfers) -> Rows:
    """Returns the row indices for a call of one network. A row that is guided in its next step has a second evaluation.

    If shapes are rounded up, padding rows follow the rows of the trajectories, and additional evaluations of the first
    row follow the guided evaluations. Their results are discarded.

    Example with exact shapes: three rows, of which row 1 is guided, have 4 evaluations. `source` is [0, 1, 2, 1] and
    `second` is [0, 3, 2]: the second evaluation of row 1 is evaluation 3.
    """
    count = shapes.rows(len(trajectories))
    slots = [trajectory.slot for trajectory in trajectories]
    assert None not in slots, "rows_of() needs trajectories with a slot"
    guided = [place for place, trajectory in enumerate(trajectories) if trajectory.evaluations == 2]
    num_evaluations = shapes.evaluations(count, len(guided))
    second = list(range(count))
    for evaluation, place in enumerate(guided, start=count):
        second[place] = evaluation
    parts = (
        [slot or PADDING for slot in slots] + [PADDING] * (count - len(slots)),
        [trajectory.step for trajectory in trajectories] + [0] * (count - len(slots)),
        [*range(count), *guided, *[0] * (num_evaluations - count - len(guided))],
        second,
    )
    return Rows(*transfers.upload([index for part in parts for index in part]).split([len(part) for part in parts]))
