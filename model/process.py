"""The complete process for a batch of rows, each with its own plan. It uses the step of model/step.py."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from model.noise import normal
from model.sampler import Plan
from model.schedule import Schedule
from model.spec import Guidance
from model.step import Rows, State, Step

OnStep = Callable[[int, Tensor, Tensor], None]  # called with k, x_t and predicted x_0 of the rows that take step k


@dataclass(frozen=True, slots=True)
class Start:
    """Images from which trajectories start: x_t = signal * image + noise * z. Without a Start, x_T = z.

    Pixels with `is_known` are pixels of x_0: each step replaces the predicted x_0 there by `image`. They then follow
    the forward process exactly, so the other pixels are generated to fit them (Lugmayr 2022, eq. 8, for any sampler).
    """

    image: Tensor  # (B, C, H, W) float32
    signal: Tensor  # (B,) float32
    noise: Tensor  # (B,) float32
    is_known: Tensor | None = None  # (B, C, H, W) bool; None = no pixel is known

    @classmethod
    def at(cls, schedule: Schedule, t: int, image: Tensor, is_known: Tensor | None = None) -> "Start":
        """Starts all rows from the forward process at timestep t: x_t ~ q(x_t | x_0 = image) (Ho 2020, eq. 4)."""
        signal, noise = (image.new_full((len(image),), each) for each in schedule.signal_and_noise(t))  # (B,) each
        return cls(image, signal, noise, is_known)

    def rows(self, rows: Tensor) -> "Start":
        """Returns the images with the indices `rows` (B,), on the device of `rows`."""
        parts = (self.image, self.signal, self.noise, self.is_known)
        return Start(*(None if part is None else part.to(rows.device)[rows] for part in parts))  # type: ignore[arg-type]

    def x_t(self, z: Tensor) -> Tensor:
        """Returns the first x_t (B, C, H, W) for standard normal noise z (B, C, H, W)."""
        return self.signal[:, None, None, None] * self.image + self.noise[:, None, None, None] * z


def begin(
    plans: Sequence[Plan],
    image_shape: tuple[int, int, int],
    *,
    seed: Tensor,
    index: Tensor,
    guidance_scale: float = 1.0,
    start: Start | None = None,
) -> tuple[State, Tensor, Tensor]:
    """Returns the initial state of the rows, the table (P, 7) of their plans, and the first row (B,) of each plan.

    Row i follows plans[i]. Its step k uses row first_row[i] + k of the table. Rows can share a plan. seed and index are
    (B,) int64 on the device of the step. Without `start`, the rows start from x_T.
    """
    distinct = {id(plan): plan for plan in plans}
    starts = dict(zip(distinct, accumulate((plan.num_steps for plan in distinct.values()), initial=0), strict=False))
    state = State.zeros(len(plans), image_shape, seed.device)
    z = normal(seed, index, torch.zeros_like(seed), image_shape)  # (B, C, H, W)
    state.x_t = (start.x_t(z) if start else z).contiguous()  # a compiled step needs contiguous inputs
    if start and start.is_known is not None:
        state.known, state.is_known = start.image.contiguous(), start.is_known.contiguous()
    state.seed, state.index = seed, index
    state.guidance_scale.fill_(guidance_scale)
    first_row = torch.tensor([starts[id(plan)] for plan in plans], device=seed.device)  # (B,)
    return state, torch.cat([plan.table(seed.device) for plan in distinct.values()]), first_row


@torch.inference_mode()
def draw(  # noqa: PLR0913 # most are optional
    step: Step,
    plans: Sequence[Plan],
    image_shape: tuple[int, int, int],
    *,
    seed: Tensor,
    index: Tensor,
    y: Tensor,
    null_label: int = 10,
    guidance: Guidance | None = None,
    start: Start | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Generates images: returns x_0 (B, C, H, W). Row i follows plans[i].

    `step` computes each step, for the rows whose plan is not finished. seed, index and y are (B,) int64 on the device
    of `step`. `guidance` applies to all rows; None turns it off. `start` has the images to start from. `on_step` is
    called after each step.
    """
    guidance = guidance or Guidance()
    state, table, first_row = begin(
        plans, image_shape, seed=seed, index=index, guidance_scale=guidance.scale, start=start
    )
    for k in range(max(plan.num_steps for plan in plans)):
        running = [row for row, plan in enumerate(plans) if k < plan.num_steps]
        guided = [i for i, row in enumerate(running) if guidance.acts_at(plans[row].timesteps[k])]
        slots = torch.tensor(running, device=y.device)  # (B,)
        slot = torch.tensor([*running, *(running[i] for i in guided)], device=y.device)  # (N,)
        second = torch.arange(len(running))  # (B,)
        second[torch.tensor(guided, dtype=torch.int64)] = len(running) + torch.arange(len(guided))
        label = torch.cat([y[slots], torch.full_like(y[: len(guided)], null_label)])  # (N,)
        taken = Rows(slot, first_row[slot] + k, label, torch.full_like(slots, 1 + k), second.to(y.device))
        stepped = step(state, table, taken)
        if on_step:
            on_step(k, state.x_t[slots], stepped.x_0)
        state.x_t.index_copy_(0, slots, stepped.x_prev)
        state.x_0.index_copy_(0, slots, stepped.x_0)
    return state.x_0
