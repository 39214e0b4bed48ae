"""The complete reverse process for a batch of rows, each with its own plan. It uses the step of model/step.py."""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from model.noise import normal
from model.sampler import Guidance, Plan
from model.step import Rows, State, Step

OnStep = Callable[[int, Tensor, Tensor], None]  # called with k, x_t and predicted x_0 of the rows that take step k


def begin(
    plans: Sequence[Plan],
    image_shape: tuple[int, int, int],
    *,
    seed: Tensor,
    index: Tensor,
    y: Tensor,
    guidance_scale: float = 1.0,
) -> tuple[State, Tensor]:
    """Returns the initial state of the rows (x_T) and the table (P, 5) of their plans. Both are inputs of a step.

    Row i follows plans[i]. Rows can share a plan. seed, index and y are (B,) int64 on the device of the step.
    """
    distinct = {id(plan): plan for plan in plans}
    starts = dict(zip(distinct, accumulate((plan.num_steps for plan in distinct.values()), initial=0), strict=False))
    state = State.zeros(len(plans), image_shape, y.device)
    state.x_t = normal(seed, index, torch.zeros_like(seed), image_shape)  # (B, C, H, W)
    state.seed, state.index, state.y = seed, index, y
    state.plan_row = torch.tensor([starts[id(plan)] for plan in plans], device=y.device)
    state.guidance_scale.fill_(guidance_scale)
    return state, torch.cat([plan.table(y.device) for plan in distinct.values()])


@torch.inference_mode()
def draw(
    step: Step,
    plans: Sequence[Plan],
    image_shape: tuple[int, int, int],
    *,
    seed: Tensor,
    index: Tensor,
    y: Tensor,
    guidance: Guidance | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Generates images: returns x_0 (B, C, H, W). Row i follows plans[i].

    `step` computes each step, for the rows whose plan is not finished. seed, index and y are (B,) int64 on the device
    of `step`. `guidance` applies to all rows; None turns it off. `on_step` is called after each step.
    """
    guidance = guidance or Guidance()
    keys = {"seed": seed, "index": index, "y": y}
    state, table = begin(plans, image_shape, **keys, guidance_scale=guidance.scale)
    for k in range(max(plan.num_steps for plan in plans)):
        running = [row for row, plan in enumerate(plans) if k < plan.num_steps]
        guided = [i for i, row in enumerate(running) if guidance.acts_at(plans[row].timesteps[k])]
        slots = torch.tensor(running, device=y.device)  # (B,)
        rows, again = torch.arange(len(running)), torch.tensor(guided, dtype=torch.int64)
        source, second = torch.cat([rows, again]), rows.clone()
        second[again] = len(rows) + torch.arange(len(again))
        taken = Rows(slots, torch.full_like(slots, k), source.to(y.device), second.to(y.device))
        x_prev, x_0, _ = step(state, table, taken)
        if on_step:
            on_step(k, state.x_t[slots], x_0)
        state.x_t.index_copy_(0, slots, x_prev)
        state.x_0.index_copy_(0, slots, x_0)
    return state.x_0
