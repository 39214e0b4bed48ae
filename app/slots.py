"""Places on the device for the state of every image that has begun, whether or not it is in the next step."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from app.trajectory import Trajectory

FIRST_SLOTS = 64


@dataclass(slots=True)
class State:
    """Rows of state: x_t, the last predicted x_0, and what the row was asked to be."""

    x_t: Tensor  # (B, C, H, W) float32
    x_0: Tensor  # (B, C, H, W) float32
    seed: Tensor  # (B,) int64, as all below
    index: Tensor
    y: Tensor
    plan_row: Tensor  # where in the table of coefficients the row's plan starts
    step: Tensor  # reverse steps done
    guidance_scale: Tensor  # (B,) float32


class Slots:
    """One state whose rows are dealt out to trajectories; it grows when all are taken."""

    def __init__(self, image_shape: tuple[int, int, int], device: torch.device) -> None:
        def images() -> Tensor:
            return torch.zeros(FIRST_SLOTS, *image_shape, device=device)

        def integers() -> Tensor:
            return torch.zeros(FIRST_SLOTS, dtype=torch.int64, device=device)

        scales = torch.ones(FIRST_SLOTS, device=device)
        self.state = State(
            images(), images(), integers(), integers(), integers(), integers(), integers(), guidance_scale=scales
        )
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

    def read(self, slots: Tensor) -> State:
        """The rows in the slots (B,)."""
        return State(*(getattr(self.state, field.name)[slots] for field in fields(State)))

    def write(self, slots: Tensor, **rows: Tensor) -> None:
        """Puts the named rows (B, ...) into the slots (B,)."""
        for name, value in rows.items():
            getattr(self.state, name)[slots] = value

    def _grow(self) -> None:
        size = len(self.state.seed)
        old = [getattr(self.state, field.name) for field in fields(State)]
        self.state = State(*(torch.cat([rows, torch.zeros_like(rows)]) for rows in old))
        self._free += range(size, 2 * size)
