"""The runner on a GPU: runs the steps as CUDA graphs, and does not wait for them."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Generic, TypeVar

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from app.engine.interface import DeviceLostError, OutOfMemoryError, Reading
from app.engine.job import DEFAULT_MODEL, GUIDED_EVALUATIONS, Pixels, StepRows, Trajectory
from app.engine.step_times import StepTimes
from app.runner.clip import ClipModel
from app.runner.device import device_errors
from app.runner.device_state import indices_of, labels_of
from app.runner.graphs.device import Array, Download, GraphDevice
from app.runner.graphs.graph_calls import GraphCalls
from app.runner.graphs.row_state import GraphSlots
from app.runner.graphs.shapes import Shape, all_shapes, first_shapes, fixed, padded
from app.runner.loaded_model import LoadedModel
from app.runner.runner import Runner
from model.checkpoint import Checkpoint
from model.clip_guidance import guide_with_clip
from model.sampler import COLUMN_OF_B
from model.step import Rows, Stepped

T = TypeVar("T")
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # the numbers of rows for which warm-up measures the step time
MOST_ROWS = BATCHES[-1]  # of the shapes that are captured before they are needed
FIRST_SLOTS = 2047  # Their number seldom has to grow. If it grows, all graphs must be captured again.
# The smallest and the largest number of noise images that are drawn together. An image with 100 steps needs 100. 8,192
# need 200 MB of temporary tensors.
FEWEST_DRAWS, MOST_DRAWS = 128, 8192
MOST_INPUTS = 1 << 16  # integers of one step: three for each row and two for each evaluation
LARGEST_PADDING = 2  # limit for the evaluations of a larger graph that is used while the exact one is not captured
# The rows of the array of facts. _SKIPPED is the number of finished steps whose noise is no longer stored.
_LABEL, _IS_SPECIAL, _SEED, _INDEX, _NUM_NOISY, _SKIPPED = range(6)
_ZEROS, _NUMBERS = np.zeros(MOST_INPUTS, dtype=np.int64), np.arange(MOST_INPUTS)


@dataclass(frozen=True, slots=True)
class LateReading(Generic[T]):
    """Values that the device copies to the host."""

    download: Download
    convert: Callable[[Tensor], T]

    def is_ready(self) -> bool:
        """Returns True if the values are on the host."""
        return self.download.is_ready()

    def wait(self) -> T:
        """Waits for the values. Raises DeviceLostError if the device has failed."""
        try:
            host = self.download.wait()
        except Exception as error:
            raise DeviceLostError("a step failed after it was enqueued on the device") from error
        return self.convert(host)


@dataclass(frozen=True, slots=True)
class Call:
    """A call of one network: B rows, their first evaluations, and further evaluations. Arrays are int64."""

    model: LoadedModel
    slots: Array  # (B,) slot of each row
    steps: Array  # (B,) number of steps that each row has finished, without the skipped ones
    further: Array  # (F,) row of each further evaluation
    label: Array  # (B + F,) label of each evaluation
    second: Array  # (B,) unconditional evaluation of a guided row, first evaluation of any other row
    has_known: bool

    def padded(self, shape: Shape, null_label: int) -> list[Array]:
        """Returns the parts of the inputs of a graph of this shape, in the order of Rows in model/step.py.

        Padding rows use the padding slot. Further evaluations that pad are evaluations of the first row.
        """
        count, num_further = len(self.slots), len(self.further)
        more, further = shape.rows - count, shape.further - num_further
        labels = np.full(max(more, further), null_label)
        return [
            *(self.slots, _ZEROS[:more]),
            *(self.steps, _ZEROS[:more]),
            *(_NUMBERS[: shape.rows], self.further, _ZEROS[:further]),
            *(self.label[:count], labels[:more], self.label[count:], labels[:further]),
            *(np.where(self.second < count, self.second, self.second + more), _NUMBERS[count : shape.rows]),
        ]


class GraphRunner(Runner):
    """Enqueues each step as one CUDA graph for each model. The host waits only if it is CALLS_AHEAD calls ahead.

    The host keeps the facts about the rows that a call needs in an array with a column for each slot. So a step of
    images runs no Python code for each row.
    """

    _slots: GraphSlots

    def __init__(
        self,
        models: Mapping[str, Checkpoint],
        device: GraphDevice,
        dtype: torch.dtype,
        *,
        clip: ClipModel | None = None,
        num_slots: int = FIRST_SLOTS,
        most_rows: int = MOST_ROWS,
        fixed_rows: int | None = None,
    ) -> None:
        """`num_slots` is the initial number of slots, `most_rows` the largest step that warm-up captures.

        With `fixed_rows`, each step is padded to this number of rows. The kernels are then the same in each step, so
        that a row has the same bits in each step. A larger step raises ValueError.
        """
        self._gpu, self._num_slots = device, num_slots
        self._fixed = fixed(fixed_rows) if fixed_rows else None
        self._most_rows = fixed_rows or most_rows
        super().__init__(models, device.device, dtype, clip=clip)
        with torch.inference_mode():
            self._noise, self._steps = GraphCalls(device, 4 * MOST_DRAWS), GraphCalls(device, MOST_INPUTS)
        self._versions = self._slots.version, len(self._plans.table)  # of the tensors that the graphs use
        self._missing: dict[tuple[str, Shape], None] = {}  # graphs to capture in idle time, the next one last
        self._larger: dict[tuple[str, Shape], Shape | None] = {}  # the larger graph of a shape that is not captured
        self._trajectories: list[Trajectory] | None = None  # the rows of the last step
        self._slots_of_rows: Array = np.zeros(0, dtype=np.int64)  # (B,)
        self._is_plain = True  # True if no row is special
        self._facts: Array = np.zeros((6, 0), dtype=np.int64)  # (facts, slots)
        self._most_noisy = 0  # the largest number of steps with noise of a row so far

    def _new_slots(self, num_labels: int) -> GraphSlots:
        noise_steps = max(info.max_steps for info in self.models.values())
        return GraphSlots(self._num_slots, self.image_shape, self._gpu, num_labels, noise_steps)

    def step(self, rows: StepRows, before_call: Callable[[], None] = lambda: None) -> list[Trajectory]:
        """Enqueues one reverse step of each row. Returns no rows: readings tell which rows are not finite.

        `before_call` is called before the step is enqueued. Raises OutOfMemoryError or DeviceLostError for device
        errors. Any other error is a bug.
        """
        trajectories = rows.trajectories
        with torch.inference_mode(), device_errors():
            self._take(trajectories)
            self._refill_noise(rows)
            calls = [self._plain_call(rows)] if self._is_plain else self._calls(trajectories)
            prepared = [(call, self._graph_for(call)) for call in calls]  # captures allocate memory
            before_call()
            start = time.perf_counter()
            for call, shape in prepared:
                parts = call.padded(shape, call.model.program.null_label)
                self._steps.call((call.model.info.name, shape), *parts)
            if not self._is_plain:
                self._guide(trajectories)
            self.network_seconds += time.perf_counter() - start
        return []

    def pixels(self, trajectories: list[Trajectory]) -> Reading[Sequence[Pixels | None]]:
        """Reads the current prediction of x_0 of each image, as 8-bit pixels. An image without a step is black."""
        return self._read(trajectories, self._slots.read, lambda images: images[0])

    def pixels_with_x_t(self, trajectories: list[Trajectory]) -> Reading[Sequence[tuple[Pixels, Pixels] | None]]:
        """Reads the current prediction of x_0 and the current x_t of each image, as 8-bit pixels."""
        return self._read(trajectories, self._slots.read_with_x_t, lambda images: (images[0], images[1]))

    def errors(self, trajectories: list[Trajectory]) -> Reading[Sequence[Sequence[float] | None]]:
        """Reads the errors of the remaining classes in the last step, for rows that compare the classes."""
        pairs = [
            [(slot, label) for slot, labels in labels_of(trajectory, 0) for label in labels]
            for trajectory in trajectories
        ]
        places = np.array([pair for own in pairs for pair in own], dtype=np.int64).reshape(-1, 2)  # (N, 2)

        def convert(host: Tensor) -> list[Sequence[float] | None]:
            errors = iter(host.tolist())
            return [[next(errors) for _ in own] for own in pairs]

        with torch.inference_mode(), device_errors():
            download = self._gpu.read(lambda places: self._slots.error[places[:, 0], places[:, 1]], places)
        return LateReading(download, convert)

    def release(self, trajectories: list[Trajectory]) -> None:
        """Releases the slots of the trajectories. Later work on these slots is enqueued after the work of now."""
        if trajectories:
            super().release(trajectories)
            self._trajectories = None

    def warm_up(self, should_stop: Callable[[], bool]) -> StepTimes:
        """Captures the graphs of the first requests, tests each model, and measures the step times."""
        first, every = list(first_shapes(self._most_rows)), all_shapes(self._most_rows)
        shapes = [self._fixed] if self._fixed else [*first, *every]
        in_order = list(dict.fromkeys(shapes))  # without repeated shapes
        self._missing = dict.fromkeys((DEFAULT_MODEL, shape) for shape in reversed(in_order))
        for _ in shapes[: len(first)]:
            if not should_stop():
                self.idle()
        times = super().warm_up(should_stop)
        if self._fixed:  # all steps take the same time
            seconds = times.measured_seconds(self._fixed.rows)
            return StepTimes(dict.fromkeys((self._fixed.rows, self._fixed.evaluations), seconds), times.clip_seconds)
        return times

    @property
    def max_rows(self) -> int | None:
        """Returns the number of rows to which each step is padded, or None."""
        return self._fixed.rows if self._fixed else None

    @property
    def has_idle_work(self) -> bool:
        """Returns True if there are graphs to capture."""
        return bool(self._missing)

    def idle(self) -> None:
        """Captures one more graph."""
        while self._missing:
            (name, shape), _ = self._missing.popitem()
            if (name, shape) not in self._steps:
                with torch.inference_mode(), suppress(OutOfMemoryError), device_errors():
                    self._capture(self._models[name], shape)
                return

    @property
    def batches(self) -> tuple[int, ...]:
        """Returns the numbers of rows for which warm-up measures the step time."""
        if self._fixed:
            return (self._fixed.rows,)
        return tuple(rows for rows in BATCHES if rows <= self._most_rows)

    def _wait_for_device(self) -> None:
        self._gpu.synchronize()

    def _take(self, trajectories: list[Trajectory]) -> None:
        """Prepares the facts about the rows of the next steps, and begins new rows."""
        if trajectories is self._trajectories:
            return
        new = [trajectory for trajectory in trajectories if not trajectory.slots]
        if new:
            self._begin(new)
        slots = map(attrgetter("first_slot"), trajectories)
        self._slots_of_rows = np.fromiter(slots, dtype=np.int64, count=len(trajectories))
        self._is_plain = not self._facts[_IS_SPECIAL, self._slots_of_rows].any()
        self._trajectories = trajectories

    def _begin(self, trajectories: list[Trajectory]) -> None:
        rows = [trajectory for trajectory in trajectories for _ in range(trajectory.num_slots)]
        options = [row.options for row in rows]
        starts = np.array([self._plans.start_of(o, self._models[o.model].checkpoint.schedule) for o in options])
        seed, index = np.array([row.noise_key for row in rows], dtype=np.int64).T
        slots = np.array(self._slots.next_slots(trajectories), dtype=np.int64)
        self._drop_outdated_graphs()
        scale = np.array([o.guidance_scale for o in options], dtype=np.float32)
        num_noisy = np.array([self._plans.num_noisy[start] for start in starts.tolist()], dtype=np.int64)
        first = self._first_draws(slots, seed, index)
        further = self._step_draws(slots, seed, index, np.zeros_like(slots), num_noisy)
        self._draw(np.concatenate([first, further], axis=1))
        inputs = [row.input for row in rows]

        def write(slots: Tensor, seed: Tensor, index: Tensor, plan_row: Tensor, guidance_scale: Tensor) -> None:
            z = self._slots.first_noise(slots)  # (B, C, H, W)
            self._slots.write(
                slots,
                x_0=torch.zeros_like(z),
                seed=seed,
                index=index,
                plan_row=plan_row,
                guidance_scale=guidance_scale,
                **self._images_of(inputs, z),
            )
            self._slots.pixels.index_fill_(0, slots, 0)
            self._slots.finite.index_fill_(0, slots, value=True)

        self._gpu.enqueue(write, slots, seed, index, starts, scale)
        self._slots.assign(trajectories)
        self._remember(rows, slots, seed, index, num_noisy)

    def _remember(self, rows: list[Trajectory], slots: Array, seed: Array, index: Array, num_noisy: Array) -> None:
        """Stores the facts about new rows that steps need."""
        size = len(self._slots.finite)
        if self._facts.shape[1] < size:
            more = np.zeros((len(self._facts), size - self._facts.shape[1]), dtype=np.int64)
            self._facts = np.concatenate([self._facts, more], axis=1)
        null_label = self._models[DEFAULT_MODEL].program.null_label
        self._facts[_LABEL, slots] = [null_label if row.digit is None else row.digit for row in rows]
        self._facts[_IS_SPECIAL, slots] = [_is_special(row) for row in rows]
        self._facts[_SEED:, slots] = [seed, index, num_noisy, np.zeros_like(slots)]
        self._most_noisy = max(self._most_noisy, int(num_noisy.max()))

    def _refill_noise(self, rows: StepRows) -> None:
        """Draws the noise of the next steps for rows that have used their noise. Only long paths need this."""
        most = self._slots.noise_steps
        if self._most_noisy <= most:
            return
        due = np.flatnonzero((rows.steps > 0) & (rows.steps % most == 0))
        trajectories = [rows.trajectories[place] for place in due.tolist()]
        slots = np.array([slot for trajectory in trajectories for slot in trajectory.slots], dtype=np.int64)
        done = np.repeat(rows.steps[due], [len(trajectory.slots) for trajectory in trajectories])
        is_new = self._facts[_SKIPPED, slots] < done  # a step that failed is repeated
        slots, done = slots[is_new], done[is_new]
        if len(slots):
            facts = self._facts[:, slots]
            self._draw(self._step_draws(slots, facts[_SEED], facts[_INDEX], done, facts[_NUM_NOISY]))
            self._gpu.enqueue(lambda slots: self._slots.skip(slots, most), slots)
            self._facts[_SKIPPED, slots] = done

    def _first_draws(self, slots: Array, seed: Array, index: Array) -> Array:
        """Returns the draws (4, B) of x_T of slots (B,)."""
        most = self._slots.noise_steps
        return np.stack([seed, index, np.zeros_like(slots), slots * (most + 1) + most])

    def _step_draws(self, slots: Array, seed: Array, index: Array, done: Array, num_noisy: Array) -> Array:
        """Returns the draws (4, D) of the next steps of slots (B,).

        `done` (B,) is the number of finished steps, `num_noisy` (B,) the number of steps that need noise.
        """
        most = self._slots.noise_steps
        counts = np.clip(num_noisy - done, 0, most)  # (B,) noise images of each slot
        row = np.repeat(np.arange(len(slots)), counts)  # (D,)
        entry = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)  # (D,) in the noise of the slot
        return np.stack([seed[row], index[row], done[row] + entry + 1, slots[row] * (most + 1) + entry])

    def _draw(self, draws: Array) -> None:
        """Enqueues drawing noise images. `draws` (4, D) has the arguments of `GraphSlots.draw`."""
        for part in np.split(draws, range(MOST_DRAWS, draws.shape[1], MOST_DRAWS), axis=1):
            if not part.shape[1]:
                continue
            size = max(FEWEST_DRAWS, 1 << (part.shape[1] - 1).bit_length())
            if size not in self._noise:
                self._noise.capture(size, partial(self._run_draw, size))
            padding = np.zeros(size - part.shape[1], dtype=np.int64)  # draws into the padding slot
            self._noise.call(size, *(half for values in part for half in (values, padding)))

    def _run_draw(self, size: int) -> None:
        self._slots.draw(*self._noise.inputs[: 4 * size].view(4, size).unbind())

    def _plain_call(self, rows: StepRows) -> Call:
        """Returns the call of a step in which each row has one evaluation, or two if it is guided."""
        model, slots, count = self._models[DEFAULT_MODEL], self._slots_of_rows, len(self._slots_of_rows)
        guided = np.flatnonzero(rows.sizes == GUIDED_EVALUATIONS)
        label = np.concatenate([self._facts[_LABEL, slots], np.full(len(guided), model.program.null_label)])
        second = np.arange(count)
        second[guided] = count + np.arange(len(guided))
        return Call(model, slots, rows.steps - self._facts[_SKIPPED, slots], guided, label, second, has_known=False)

    def _calls(self, trajectories: list[Trajectory]) -> list[Call]:
        """Returns the call of each model, for any rows."""
        by_model: dict[str, list[Trajectory]] = {}
        for trajectory in trajectories:
            by_model.setdefault(trajectory.job.request.options.model, []).append(trajectory)
        return [self._call_of(self._models[name], own) for name, own in by_model.items()]

    def _call_of(self, model: LoadedModel, trajectories: list[Trajectory]) -> Call:
        slots, steps, source, label, second = map(np.array, indices_of(trajectories, model.program.null_label))
        steps = steps - self._facts[_SKIPPED, slots]
        return Call(model, slots, steps, source[len(slots) :], label, second, any(map(_has_known, trajectories)))

    def _graph_for(self, call: Call) -> Shape:
        """Returns the shape of a captured graph for the call.

        If the exact shape is not captured, a larger one is used, and the exact one is captured when the device is idle.
        If there is no larger one with at most LARGEST_PADDING times the evaluations, it is captured now.
        """
        name, exact = call.model.info.name, padded(len(call.slots), len(call.further), has_known=call.has_known)
        if self._fixed:
            if not self._fixed.holds(exact._replace(rows=len(call.slots), further=len(call.further))):
                raise ValueError(f"a step of {len(call.slots)} rows exceeds the fixed number of {self._fixed.rows}")
            exact = self._fixed
        if (name, exact) in self._steps:
            return exact
        if (name, exact) not in self._larger:
            captured = [shape for own, shape in self._steps if own == name and shape.holds(exact)]
            smallest = min(captured, key=lambda shape: shape.evaluations, default=None)
            fits = smallest and smallest.evaluations <= LARGEST_PADDING * exact.evaluations
            self._larger[name, exact] = smallest if fits else None
            self._missing.pop((name, exact), None)
            self._missing[name, exact] = None
        if larger := self._larger[name, exact]:
            return larger
        self._capture(call.model, exact)
        return exact

    def _capture(self, model: LoadedModel, shape: Shape) -> None:
        self._larger.clear()
        self._missing.pop((model.info.name, shape), None)
        self._steps.capture((model.info.name, shape), partial(self._run_step, model, shape))

    def _run_step(self, model: LoadedModel, shape: Shape) -> None:
        """The work of a step: reads the rows from their slots, and writes the results to the slots."""
        B, N = shape.rows, shape.evaluations
        rows = Rows(*self._steps.inputs[: 3 * B + 2 * N].split([B, B, N, N, B]))
        state = self._slots.state if shape.has_known else self._slots.plain_state
        stepped = model.step(state, self._plans.table, rows)
        self._slots.store(rows.slots, stepped)
        if shape.has_known:
            self._slots.write_errors(rows.slots[rows.source], rows.label, stepped.error)

    def _drop_outdated_graphs(self) -> None:
        """Removes the graphs if tensors that they use were replaced by larger ones."""
        versions = self._slots.version, len(self._plans.table)
        if versions != self._versions:
            self._versions = versions
            self._steps.clear()
            self._noise.clear()
            self._larger.clear()

    def _guide(self, trajectories: list[Trajectory]) -> None:
        """Enqueues CLIP guidance for the rows that have it in this step. It changes the results of the step."""
        guided = [(row, row.clip) for row in trajectories if row.clip]
        if self.clip is None or not guided:
            return
        clip = self.clip.clip
        slots, steps = np.array([(row.slots[0], row.step) for row, _ in guided], dtype=np.int64).T
        steps = steps - self._facts[_SKIPPED, slots]
        text = np.stack([target.text for _, target in guided])  # (M, E)
        scale = np.array([target.scale for _, target in guided], dtype=np.float32)

        def guide(slots: Tensor, steps: Tensor, text: Tensor, scale: Tensor) -> None:
            state = self._slots.state
            b = self._plans.table[state.plan_row[slots] + steps, COLUMN_OF_B]  # (M,)
            stepped = Stepped(state.x_t[slots], state.x_0[slots], scale.new_zeros(0), self._slots.finite[slots])
            chosen = torch.arange(len(slots), device=slots.device)  # (M,)
            self._slots.store(slots, guide_with_clip(clip, stepped, chosen, b, text, scale))

        self._gpu.enqueue(guide, slots.copy(), steps, text, scale)

    def _read(
        self,
        trajectories: list[Trajectory],
        read: Callable[[Tensor], Tensor],
        of_row: Callable[[Array], T],
    ) -> Reading[Sequence[T | None]]:
        """Reads 8-bit images (n, H, W[, C]) of each row. `of_row` converts those of one row.

        The images of a row without a step are black. A row that is not finite has None.
        """
        begun = [trajectory for trajectory in trajectories if trajectory.slots]
        place = {trajectory: i for i, trajectory in enumerate(begun)}
        layout = "b s 1 h w -> b s h w" if self.image_shape[0] == 1 else "b s c h w -> b s h w c"
        C, H, W = self.image_shape
        slots = np.array([trajectory.slots[0] for trajectory in begun], dtype=np.int64)

        def convert(host: Tensor) -> list[T | None]:
            values = host.numpy()
            num_images = values.shape[1] // (C * H * W)
            images = rearrange(values[:, 1:].reshape(-1, num_images, C, H, W), layout)
            black = np.zeros((2, *images.shape[2:]), dtype=np.uint8)
            results: list[T | None] = []
            for trajectory in trajectories:
                at = place.get(trajectory)
                is_finite = at is None or bool(values[at, 0])
                results.append(of_row(black if at is None else images[at]) if is_finite else None)
            return results

        with torch.inference_mode(), device_errors():
            download = self._gpu.read(read, slots)
        return LateReading(download, convert)


def _is_special(row: Trajectory) -> bool:
    """Returns True for rows whose evaluations do not follow from their size, and for rows with known pixels."""
    return _has_known(row) or row.job.request.clip is not None or row.options.model != DEFAULT_MODEL


def _has_known(row: Trajectory) -> bool:
    return row.comparison is not None or (row.input is not None and row.input.is_known is not None)
