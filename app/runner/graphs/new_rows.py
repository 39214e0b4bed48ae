"""Begins rows on a device that runs CUDA graphs: draws their noise and writes their first state."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from app.engine.job import Trajectory
from app.runner.device_state import Plans
from app.runner.graphs.device import Array, GraphDevice
from app.runner.graphs.graph_calls import GraphCalls
from app.runner.graphs.row_state import GraphSlots
from model.spec import MNIST_SHAPE

# The smallest and the largest number of noise images that are drawn together. An image with 100 steps needs 100.
# Drawing 8,192 images of 28 x 28 pixels uses 200 MB for temporary tensors. Larger images are drawn in smaller groups.
FEWEST_DRAWS, MOST_DRAWS = 128, 8192
FEWEST_ROWS, MOST_ROWS = 8, 512  # the smallest and the largest number of rows that are begun together
# The indices of the facts about a row. SKIPPED is the number of finished steps whose noise is no longer stored.
LABEL, IS_SPECIAL, PLAN_ROW, SKIPPED, _SEED, _INDEX, _NUM_NOISY = range(7)


class NewRows:
    """Begins rows of one model. `facts` has the values that later steps need: a column for each slot."""

    def __init__(
        self,
        device: GraphDevice,
        slots: GraphSlots,
        plans: Plans,
        null_label: int,
    ) -> None:
        self._gpu, self._slots, self._plans, self._null_label = device, slots, plans, null_label
        self._most_draws = _fitting(MOST_DRAWS, math.prod(slots.state.x_t.shape[1:]), FEWEST_DRAWS)
        self._draws, self._starts = GraphCalls(device, 4 * self._most_draws), GraphCalls(device, 2 * MOST_ROWS)
        self.missing: list[Callable[[], None]] = []  # captures of graphs; the last one is the next
        self._most_steps = 0  # the largest number of steps of a row until now
        self.facts: Array = np.zeros((7, 0), dtype=np.int64)  # (facts, slots)

    def capture(self) -> None:
        """Captures all graphs, so that no request waits for their capture."""
        self._add_missing()
        while self.missing:
            self.capture_next()

    def capture_next(self) -> None:
        """Captures one of the missing graphs, large ones first. If memory is short, it is not tried again."""
        self.missing.pop()()

    def clear(self) -> None:
        """Removes all graphs, because tensors that they use were replaced. They are missing from then on."""
        self._draws.clear()
        self._starts.clear()
        self._add_missing()

    def _add_missing(self) -> None:
        starts = [partial(self._capture_starts, size) for size in _sizes(FEWEST_ROWS, MOST_ROWS)]
        draws = [partial(self._capture_draws, size) for size in _sizes(FEWEST_DRAWS, self._most_draws)]
        self.missing = [*starts, *draws]

    def begin(self, trajectories: Sequence[Trajectory], slots: Array) -> None:
        """Enqueues the work that begins the rows of the trajectories in these slots.

        The slots are in the order of the trajectories. The plans of the rows must be in the table of plans.
        """
        rows = [trajectory for trajectory in trajectories for _ in range(trajectory.num_slots)]
        facts = np.array([self._facts_of(row) for row in rows], dtype=np.int64).T  # (facts, B)
        size = len(self._slots.finite)
        if self.facts.shape[1] < size:
            more = np.zeros((len(self.facts), size - self.facts.shape[1]), dtype=np.int64)
            self.facts = np.concatenate([self.facts, more], axis=1)
        self.facts[:, slots] = facts
        self._most_steps = max(self._most_steps, *(self._plans.num_steps[row.first_plan_row] for row in trajectories))
        self._draw_noise(slots, facts, first=0)
        scale = np.array([row.options.guidance_scale for row in rows], dtype=np.float32)
        self._start(slots, scale.view(np.int32))
        self._give_images(rows, slots)

    @property
    def can_use_all_noise(self) -> bool:
        """Returns True if a row has more than `noise_steps` steps, the number whose noise fits into a slot."""
        return self._most_steps > self._slots.noise_steps

    def refill_noise(self, trajectories: Sequence[Trajectory], steps: Array) -> bool:
        """Draws the noise of the next steps for rows that have used all their noise. `steps` (B,) are their steps.

        Returns True if the number of skipped steps of a row has changed.
        """
        most = self._slots.noise_steps
        due = np.flatnonzero((steps > 0) & (steps % most == 0)).tolist()
        slots = np.array([slot for place in due for slot in trajectories[place].slots], dtype=np.int64)
        done = np.repeat(steps[due], [len(trajectories[place].slots) for place in due])
        is_new = self.facts[SKIPPED, slots] < done  # False if a failed step is repeated
        slots, done = slots[is_new], done[is_new]
        if len(slots):
            facts = self.facts[:, slots]  # a copy; if the draw fails, the facts stay unchanged
            facts[SKIPPED] = done
            self._draw_noise(slots, facts, first=1)
            self.facts[SKIPPED, slots] = done
        return bool(len(slots))

    def _facts_of(self, row: Trajectory) -> tuple[int, ...]:
        plan_row = row.first_plan_row
        label = self._null_label if row.label is None else row.label
        return label, is_special(row), plan_row, 0, *row.noise_key, self._plans.num_noisy[plan_row]

    def _draw_noise(self, slots: Array, facts: Array, first: int) -> None:
        """Draws the noise that the steps of slots (B,) with facts (facts, B) need, from entry `first` on.

        Entry 0 is the noise of x_T. Entry k is the noise of step k, counted after the skipped steps.
        """
        most = self._slots.noise_steps
        counts = 1 - first + np.clip(facts[_NUM_NOISY] - facts[SKIPPED], 0, most)  # (B,) noise images of each slot
        row = np.repeat(np.arange(len(slots)), counts)  # (D,)
        entry = first + np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)  # (D,)
        step = entry + facts[SKIPPED, row]  # (D,)
        self._draw(np.array([facts[_SEED, row], facts[_INDEX, row], step, slots[row] * (1 + most) + entry]))

    def _draw(self, draws: Array) -> None:
        """Enqueues drawing noise images. `draws` (4, D) has the arguments of `GraphSlots.draw`."""
        for part in np.split(draws, range(self._most_draws, draws.shape[1], self._most_draws), axis=1):
            if count := part.shape[1]:
                size = _size(count, FEWEST_DRAWS)
                self._capture_draws(size)
                padding = np.zeros(size - count, dtype=np.int64)  # These draws write to the padding slot.
                self._draws.call(size, *(half for values in part for half in (values, padding)))

    def _start(self, slots: Array, scale_bits: Array) -> None:
        """Enqueues writing the first state of rows that start from noise."""
        for part in range(0, len(slots), MOST_ROWS):
            own, bits = slots[part : part + MOST_ROWS], scale_bits[part : part + MOST_ROWS]
            size = _size(len(own), FEWEST_ROWS)
            self._capture_starts(size)
            padding = np.zeros(size - len(own), dtype=np.int64)  # These rows use the padding slot.
            self._starts.call(size, own, padding, bits, padding)

    def _give_images(self, rows: list[Trajectory], slots: Array) -> None:
        """Enqueues writing the first state of the rows that start from an image."""
        given = [(place, own) for place, row in enumerate(rows) if (own := row.input)]
        if not given:
            return
        images = np.stack([own.image for _, own in given])  # (M, C, H, W)
        none = np.zeros(images.shape[1:], dtype=np.bool_)
        is_known = np.stack([none if own.is_known is None else own.is_known for _, own in given])
        factors = np.array([(own.signal, own.noise) for _, own in given], dtype=np.float32)  # (M, 2)
        self._gpu.enqueue(self._slots.start_from, slots[[place for place, _ in given]], images, is_known, factors)

    def _capture_draws(self, size: int) -> None:
        if size not in self._draws:
            self._draws.capture(size, partial(self._run_draws, size))

    def _capture_starts(self, size: int) -> None:
        if size not in self._starts:
            self._starts.capture(size, partial(self._run_starts, size))

    def _run_draws(self, size: int) -> None:
        self._slots.draw(*self._draws.inputs[: 4 * size].view(4, size).unbind())

    def _run_starts(self, size: int) -> None:
        slots, bits = self._starts.inputs[: 2 * size].view(2, size).unbind()
        self._slots.start(slots, bits.to(torch.int32).view(torch.float32))


def is_special(row: Trajectory) -> bool:
    """Returns True for rows that a step handles one by one.

    These are rows with known pixels or with CLIP guidance, and rows that compare the classes.
    """
    return has_known(row) or row.job.request.clip is not None


def has_known(row: Trajectory) -> bool:
    """Returns True for rows that have known pixels or compare the classes."""
    return row.comparison is not None or (row.input is not None and row.input.is_known is not None)


def _fitting(most: int, num_pixels: int, fewest: int) -> int:
    """Returns how many images of `num_pixels` values have at most as many values as `most` images of MNIST.

    The result is a power of two from `fewest` to `most`.
    """
    fitting = max(1, most * math.prod(MNIST_SHAPE) // num_pixels)
    return max(fewest, min(most, 1 << (fitting.bit_length() - 1)))


def _size(count: int, fewest: int) -> int:
    """Returns the size of the graph for this number of rows or draws: a power of two."""
    return max(fewest, 1 << (count - 1).bit_length())


def _sizes(fewest: int, most: int) -> list[int]:
    return [fewest << k for k in range((most // fewest).bit_length())]
