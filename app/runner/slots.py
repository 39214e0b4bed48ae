"""Places on the device for the state of every image that has begun, whether or not it is in the next step."""

import torch
from torch import Tensor

from app.engine.job import Trajectory
from app.runner.transfers import Transfers
from model.step import State

NOBODY = 0  # the slot of rows that fill up a step


class Slots:
    """One state whose rows are dealt out to trajectories; it grows when all are taken."""

    def __init__(
        self, count: int, image_shape: tuple[int, int, int], device: torch.device, transfers: Transfers
    ) -> None:
        """`count` of them at first."""
        self.state = State.zeros(1 + count, image_shape, device)
        self.finite = torch.ones(1 + count, dtype=torch.bool, device=device)  # (S,) all that was computed so far
        self._free = list(range(NOBODY + 1, 1 + count))
        self._transfers = transfers

    def begin(self, trajectories: list[Trajectory], **rows: Tensor) -> None:
        """Gives each trajectory a slot with its row of state in it; all of them, or none where it raises."""
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
        """Takes the slots back from those that have one."""
        for trajectory in trajectories:
            if trajectory.slot is not None:
                self._free.append(trajectory.slot)
                trajectory.slot = None

    def of(self, trajectories: list[Trajectory]) -> Tensor:
        """The slots of those that have one, (B,)."""
        return self._transfers.upload([trajectory.slot for trajectory in trajectories if trajectory.slot is not None])

    def finite_after(self, slots: Tensor, finite: Tensor) -> Tensor:
        """Returns whether each slot's values, those of this step included, were finite so far, (B,)."""
        return self.finite[slots] & finite

    def write(self, slots: Tensor, **rows: Tensor) -> None:
        """Puts the named rows (B, ...) into the slots (B,), in place. Takes no memory on the device."""
        for name, value in rows.items():
            rows_of_slots = self.finite if name == "finite" else getattr(self.state, name)
            rows_of_slots.index_copy_(0, slots, value)

    def _grow(self) -> None:
        """Doubles the slots. All tensors are made before the first is replaced: memory may run out in between."""
        size = len(self.state.seed)
        state = State(*(torch.cat([rows, torch.zeros_like(rows)]) for rows in self.state))
        self.finite = torch.cat([self.finite, torch.ones_like(self.finite)])
        self.state = state
        self._free += range(size, 2 * size)
