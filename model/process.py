"""Complete processes for a batch of rows, each with its own plan. They use the step of model/step.py.

`draw` generates images, `compare` runs comparisons of the classes, and `recognise` runs that of images without noise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice

import torch
from torch import Tensor

from model.comparison import Comparison
from model.noise import normal
from model.recognition import DEFAULT_NUM_PAIRS, RECOGNITION_SEED, Readout, Recognition, ink_of, timesteps
from model.sampler import Plan, check_null_label, plan_through
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
    null_label: int | None = None,
    guidance: Guidance | None = None,
    start: Start | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Generates images: returns x_0 (B, C, H, W). Row i follows plans[i].

    `step` computes each step, for the rows whose plan is not finished. seed, index and y are (B,) int64 on the device
    of `step`. `guidance` applies to all rows; None turns it off. It needs the label that means "no class" (ValueError
    without it). `start` has the images to start from. `on_step` is called after each step.
    """
    guidance = guidance or Guidance()
    null = check_null_label(null_label, guidance)
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
        label = torch.cat([y[slots], torch.full_like(y[: len(guided)], null)])  # (N,)
        taken = Rows(slot, first_row[slot] + k, label, torch.full_like(slots, 1 + k), second.to(y.device))
        stepped = step(state, table, taken)
        if on_step:
            on_step(k, state.x_t[slots], stepped.x_0)
        state.x_t.index_copy_(0, slots, stepped.x_prev)
        state.x_0.index_copy_(0, slots, stepped.x_0)
    return state.x_0


@torch.inference_mode()
def compare(
    step: Step,
    plans: Sequence[Plan],
    comparisons: Sequence[Comparison],
    *,
    seed: Tensor,
    index: Tensor,
    start: Start,
) -> None:
    """Runs the comparisons of B images until all results are final. Comparison i follows plans[i].

    `start` has B images with known pixels. seed and index are (B,) int64 on the device of `step`.
    """
    num_slots = [each.num_classes if each.has_own_images else 1 for each in comparisons]
    first_slots = list(accumulate(num_slots, initial=0))
    image = torch.arange(len(plans)).repeat_interleave(torch.tensor(num_slots)).to(seed.device)  # (S,) of each slot
    C, H, W = start.image.shape[1:]
    every_plan = [plans[i] for i in image.tolist()]
    state, table, first_row = begin(
        every_plan, (C, H, W), seed=seed[image], index=index[image], start=start.rows(image)
    )
    for k in range(max(plan.num_steps for plan in plans)):
        slots, labels = list[int](), list[int]()  # of the rows
        further_slots, further_labels = list[int](), list[int]()  # of further evaluations of a row
        running = [(slot, each) for slot, each in zip(first_slots, comparisons, strict=False) if each.remaining]
        if not running:
            break
        for slot, comparison in running:
            if comparison.has_own_images:
                slots += [slot + label for label in comparison.remaining]
                labels += comparison.remaining
            else:
                further_slots += [slot] * (len(comparison.remaining) - 1)
                further_labels += comparison.remaining[1:]
                slots.append(slot)
                labels.append(comparison.remaining[0])
        every_slot = torch.tensor(slots + further_slots, device=seed.device)  # (N,)
        label = torch.tensor(labels + further_labels, device=seed.device)  # (N,)
        row = torch.arange(len(slots), device=seed.device)  # (B,)
        taken = Rows(every_slot, first_row[every_slot] + k, label, torch.full_like(row, 1 + k), row)
        stepped = step(state, table, taken)
        state.x_t.index_copy_(0, taken.slots, stepped.x_prev)
        state.x_0.index_copy_(0, taken.slots, stepped.x_0)
        errors = stepped.error.tolist()
        of_rows, further = iter(errors[: len(slots)]), iter(errors[len(slots) :])
        for _, comparison in running:
            num_rows = len(comparison.remaining) if comparison.has_own_images else 1
            num_further = len(comparison.remaining) - num_rows
            comparison.add([*islice(of_rows, num_rows), *islice(further, num_further)])


def recognise(
    step: Step,
    schedule: Schedule,
    x_0: Tensor,
    readout: Readout,
    num_pairs: int = DEFAULT_NUM_PAIRS,
    *,
    prune: bool = True,
) -> list[Recognition]:
    """Recognises images x_0 (N, C, H, W) in [-1, 1] on the device of `step`.

    With `prune`, improbable classes are dropped after each pair.
    """
    path = [*timesteps(num_pairs, schedule.num_steps), 0]
    T = schedule.num_steps
    results = [Recognition(readout, ink, num_pairs, num_steps=T, prune=prune) for ink in ink_of(x_0)]
    seed = torch.full((len(x_0),), RECOGNITION_SEED, device=x_0.device)  # (N,)
    start = Start.at(schedule, path[0], x_0, torch.ones_like(x_0, dtype=torch.bool))
    plan = plan_through(schedule, "forward", path)
    compare(step, [plan] * len(results), results, seed=seed, index=torch.zeros_like(seed), start=start)
    return results
