"""Compares the classes of an image over several steps. The result is the class with the smallest errors."""

from collections.abc import Sequence
from itertools import accumulate, islice
from typing import Protocol

import torch
from torch import Tensor

from model.process import Start, begin
from model.sampler import Plan
from model.step import Rows, Step


class Comparison(Protocol):
    """Compares the classes of an image by the errors of their predictions. It drops classes with much larger errors."""

    @property
    def num_classes(self) -> int:
        """The number of classes at the start."""

    @property
    def has_own_images(self) -> bool:
        """True if each class has its own x_t. False if all classes predict x_0 from the same x_t."""

    @property
    def remaining(self) -> list[int]:
        """The classes that the next step must evaluate. It is empty when the result is final."""

    @property
    def digit(self) -> int:
        """The class with the smallest errors so far."""

    def add(self, errors: Sequence[float]) -> None:
        """Adds the errors of a step (see `Stepped.error`), one for each class of `remaining`."""


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
