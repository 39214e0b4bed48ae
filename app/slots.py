"""Places on the device for the state of every image that has begun, whether or not it is in the next step."""

import torch
from torch import Tensor

from app.trajectory import Trajectory
from model.step import State

FIRST_SLOTS = 64


class Slots:
    """One state whose rows are dealt out to trajectories; it grows when all are taken."""

    def __init__(self, image_shape: tuple[int, int, int], device: torch.device) -> None:
        self.state = State.zeros(FIRST_SLOTS, image_shape, device)
        self._free = list(range(FIRST_SLOTS))
        self._device = device

    def begin(self, trajectories: list[Trajectory], **rows: Tensor) -> None:
        """Gives each trajectory a slot with its row of state in it; all of them, or none where it raises."""
        while len(self._free) < len(trajectories):
            self._grow()
        slots = self._free[-len(trajectories) :]
        self.write(torch.tensor(slots, device=self._device), **rows)
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
        """The slots that the trajectories have, (B,)."""
        return torch.tensor([trajectory.slot for trajectory in trajectories], dtype=torch.int64, device=self._device)

    def write(self, slots: Tensor, **rows: Tensor) -> None:
        """Puts the named rows (B, ...) into the slots (B,)."""
        for name, value in rows.items():
            getattr(self.state, name)[slots] = value

    def _grow(self) -> None:
        size = len(self.state.seed)
        self.state = State(*(torch.cat([rows, torch.zeros_like(rows)]) for rows in self.state))
        self._free += range(size, 2 * size)
