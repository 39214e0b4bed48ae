"""The runner on a GPU: runs the steps as CUDA graphs, and does not wait for them."""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from app.engine.interface import DeviceLostError, ModelInfo, OutOfMemoryError, Reading
from app.engine.job import GUIDED_EVALUATIONS, ClipTarget, Pixels, StepRows, Trajectory
from app.engine.step_times import StepTimes
from app.runner.clip import ClipModel
from app.runner.device import device_errors
from app.runner.device_state import Plans, by_model, indices_of, labels_of, num_rows_of
from app.runner.graphs.device import Array, Download, GraphDevice
from app.runner.graphs.graph_calls import CALLS_AHEAD, GraphCalls
from app.runner.graphs.new_rows import IS_SPECIAL, LABEL, PLAN_ROW, SKIPPED, NewRows, has_known
from app.runner.graphs.row_state import GraphSlots
from app.runner.graphs.shapes import Shape, all_shapes, first_shapes, fixed, shapes_to_compile
from app.runner.graphs.step_inputs import MOST_INPUTS, Call, PlainStep
from app.runner.loaded_model import LoadedModel
from app.runner.runner import Runner, compiler_errors
from model.checkpoint import Checkpoint
from model.clip import Clip
from model.clip_guidance import guide_with_clip
from model.sampler import COLUMN_OF_B
from model.step import Rows, Stepped

T = TypeVar("T")
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # the numbers of rows for which warm-up measures the step time
MOST_ROWS = BATCHES[-1]  # the largest number of rows for which graphs are captured before they are needed
# The initial number of slots of a model is large, because all graphs are captured again when it grows.
FIRST_SLOTS = 2047
# A slot has the noise of all steps, unless this takes more memory for all first slots together. Then the noise of the
# next steps is drawn when it is needed. For T = 100 and images of 28 x 28 pixels, the noise takes 650 MB.
MOST_NOISE_BYTES = 1 << 30
# The initial size of the table of plans, for each model. It is large for the same reason. With T = 100, all plans of a
# model have 515,100 rows, because /edit and /denoise can start at any timestep. The table then has 15 MB.
PLAN_ROWS = 1 << 19
# While the exact graph of a step is not captured, a larger graph with at most this many times its evaluations is used.
LARGEST_PADDING = 2
# After this number of steps with a larger graph, the exact graph is captured even if the device is never idle. The
# capture takes about as long as the additional time of these steps (an estimate).
MOST_LARGER_STEPS = 200


@dataclass(frozen=True, slots=True)
class LateReading(Generic[T]):
    """Values of each row that the device copies to the host, with one download for the rows of each model."""

    trajectories: Sequence[Trajectory]
    # A download, and the function that converts its values to those of the rows of one model.
    parts: Sequence[tuple[Download, Callable[[Tensor], Mapping[Trajectory, T]]]]

    def is_ready(self) -> bool:
        """Returns True if the values are on the host."""
        return all(download.is_ready() for download, _ in self.parts)

    def wait(self) -> list[T]:
        """Waits for the values. Raises DeviceLostError if the device has failed."""
        values = dict[Trajectory, T]()
        for download, convert in self.parts:
            try:
                host = download.wait()
            except Exception as error:
                raise DeviceLostError("a step failed after it was enqueued on the device") from error
            values |= convert(host)
        return [values[trajectory] for trajectory in self.trajectories]


class GraphRunner(Runner):
    """Enqueues each step as one CUDA graph for each model. The host waits only if it is CALLS_AHEAD calls ahead.

    The facts about the rows that a call needs are in an array with a column for each slot (new_rows.py). Therefore a
    step runs no Python code for each row, except if a row is special (see `is_special`).
    """

    _slots: dict[str, GraphSlots]  # type: ignore[assignment] # _new_slots returns GraphSlots

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
        """`num_slots` is the first number of slots of a model. `most_rows` limits the graphs that are captured early.

        With `fixed_rows`, each call is padded to this number of rows, or to the number of classes if that is larger.
        The kernels are then the same in each call, and those of cuDNN are deterministic, so that a row has the same
        bits in each step. A larger step without special rows raises ValueError. A larger step with special rows is
        split into several calls.
        """
        self._gpu, self._num_slots = device, num_slots
        self._fixed_rows, self._most_rows = fixed_rows, fixed_rows or most_rows
        # A row that compares the classes can need a row for each class.
        self._fixed = {
            name: fixed(max(fixed_rows, loaded.network.config.num_classes))
            for name, loaded in models.items()
            if fixed_rows
        }
        if self._fixed:  # Some algorithms of cuDNN add numbers in another order in each run, even for the same shape.
            torch.backends.cudnn.deterministic = True  # for the whole process
        super().__init__(models, device.device, dtype, clip=clip)
        with torch.inference_mode():
            self._steps = GraphCalls(device, MOST_INPUTS)
            self._new = {
                name: NewRows(device, self._slots[name], self._plans, model.program.null_label)
                for name, model in self._models.items()
            }
        self._versions = self._current_versions()  # of the tensors that the graphs use
        self._missing: dict[tuple[str, Shape], None] = {}  # graphs to capture in idle time; the last one is the next
        self._larger: dict[tuple[str, Shape], Shape | None] = {}  # the larger graph for a shape that is not captured
        self._num_larger = Counter[tuple[str, Shape]]()  # the number of steps with a larger graph, by exact graph
        self._trajectories: list[Trajectory] | None = None  # the rows of the last step
        self._slots_of_rows: Array = np.zeros(0, dtype=np.int64)  # (B,)
        self._model = self._models[self.default_model]  # of the rows of the last step, if all have the same one
        self._is_plain = True  # True if no row is special and all rows have the same model
        self._plain: PlainStep | None = None  # the last step, if no row was special

    def _new_plans(self) -> Plans:
        return Plans(self.device, PLAN_ROWS * len(self.models))

    def _new_slots(self, info: ModelInfo) -> GraphSlots:
        fitting = MOST_NOISE_BYTES // (torch.float32.itemsize * self._num_slots * math.prod(info.image_shape))
        noise_steps = max(1, min(max(info.steps, default=info.max_steps), fitting - 1))
        return GraphSlots(self._num_slots, info.image_shape, self._gpu, 1 + info.num_classes, noise_steps)

    def _current_versions(self) -> tuple[int, ...]:
        return len(self._plans.table), *(slots.version for slots in self._slots.values())

    def step(self, rows: StepRows, before_call: Callable[[], None] = lambda: None) -> list[Trajectory]:
        """Enqueues one reverse step of each row. Returns [], because readings have None for rows that are not finite.

        `before_call` is called before the step is enqueued. Raises OutOfMemoryError or DeviceLostError for device
        errors. Any other error is a bug. After an error other than DeviceLostError, no row has changed.
        """
        trajectories = rows.trajectories
        with torch.inference_mode(), device_errors():
            self._drop_outdated_graphs()  # The last step may have failed after it had replaced tensors.
            self._take(trajectories)
            if self._refill_noise(rows):
                self._plain = None
            calls = [self._plain_inputs(rows)] if self._is_plain else self._inputs(trajectories)
            before_call()
            start = time.perf_counter()
            self._enqueue(calls, trajectories)
            self.network_seconds += time.perf_counter() - start
        return []

    def pixels(self, trajectories: list[Trajectory]) -> Reading[Sequence[Pixels | None]]:
        """Reads the current prediction of x_0 of each image, as 8-bit pixels. It is black before the first step."""
        return self._read(trajectories, GraphSlots.read, lambda images: images[0])

    def pixels_with_x_t(self, trajectories: list[Trajectory]) -> Reading[Sequence[tuple[Pixels, Pixels] | None]]:
        """Reads the current prediction of x_0 and the current x_t of each image, as 8-bit pixels."""
        return self._read(trajectories, GraphSlots.read_with_x_t, lambda images: (images[0], images[1]))

    def errors(self, trajectories: list[Trajectory]) -> Reading[Sequence[Sequence[float] | None]]:
        """Reads the errors of the remaining classes in the last step, for rows that compare the classes."""
        with torch.inference_mode(), device_errors():
            groups = by_model(trajectories).items()
            return LateReading(trajectories, [self._read_errors(self._slots[name], own) for name, own in groups])

    def _read_errors(
        self, of: GraphSlots, trajectories: list[Trajectory]
    ) -> tuple[Download, Callable[[Tensor], dict[Trajectory, Sequence[float] | None]]]:
        """Reads the errors of rows of one model."""
        pairs = [[(slot, label) for slot, labels in labels_of(row, 0) for label in labels] for row in trajectories]
        places = np.array([pair for own in pairs for pair in own], dtype=np.int64).reshape(-1, 2)  # (N, 2)

        def convert(host: Tensor) -> dict[Trajectory, Sequence[float] | None]:
            errors = iter(host.tolist())
            return {row: [next(errors) for _ in own] for row, own in zip(trajectories, pairs, strict=True)}

        return self._gpu.read(lambda places: of.error[places[:, 0], places[:, 1]], places), convert

    def release(self, trajectories: list[Trajectory]) -> None:
        """Releases the slots of the trajectories. New rows in these slots begin after all enqueued work."""
        if trajectories:
            super().release(trajectories)
            self._trajectories = self._plain = None

    @compiler_errors()
    def warm_up(self, should_stop: Callable[[], bool]) -> StepTimes:
        """Captures the graphs that the first requests need, tests each model, and measures the step times.

        Large graphs are captured before small ones. All graphs share the memory of the largest one, and a graph that is
        larger than those before it would need new memory.
        """
        with torch.inference_mode(), device_errors():
            for new in self._new.values():
                new.capture()
        if self._fixed:
            first = list(self._fixed.items())
            others: list[tuple[str, Shape]] = []
        else:
            # A compiled step is compiled here, for each model. Otherwise a request could wait for a compilation.
            compiled = [name for name, info in self.models.items() if info.compiled]
            first = [(name, shape) for name in compiled for shape in shapes_to_compile()]
            first += [(self.default_model, shape) for shape in first_shapes(self._most_rows)]
            others = [(self.default_model, shape) for shape in all_shapes(self._most_rows)]
        first = list(dict.fromkeys(first))
        self._missing = dict.fromkeys(reversed(dict.fromkeys([*first, *others])))
        for _ in first:
            if not should_stop():
                self.idle()
        times = super().warm_up(should_stop)
        if self._fixed:  # all steps take the same time
            of_models = {
                name: dict.fromkeys((shape.rows, shape.evaluations), times.of(name).seconds(self._most_rows))
                for name, shape in self._fixed.items()
            }
            return StepTimes(of_models[self.default_model], times.clip_seconds, of_models)
        return times

    @property
    def max_rows(self) -> int | None:
        """Returns the number of rows to which each step is padded, or None."""
        return self._fixed_rows

    @property
    def steps_ahead(self) -> int:
        """Returns the number of steps that `step` enqueues before it waits. Steps of two models wait earlier."""
        return CALLS_AHEAD

    @property
    def has_idle_work(self) -> bool:
        """Returns True if there are graphs to capture."""
        return bool(self._missing) or any(new.missing for new in self._new.values())

    def idle(self) -> None:
        """Captures one more graph."""
        with torch.inference_mode(), suppress(OutOfMemoryError), device_errors():
            for new in self._new.values():
                if new.missing:
                    new.capture_next()
                    return
            while self._missing:
                (name, shape), _ = self._missing.popitem()
                if (name, shape) not in self._steps:
                    self._capture(self._models[name], shape)
                    return

    @property
    def batches(self) -> tuple[int, ...]:
        """Returns the numbers of rows for which warm-up measures the step time."""
        if self._fixed_rows:
            return (self._fixed_rows,)
        return tuple(rows for rows in BATCHES if rows <= self._most_rows)

    def _wait_for_device(self) -> None:
        self._gpu.synchronize()

    def _take(self, trajectories: list[Trajectory]) -> None:
        """Prepares the facts about the rows of the next steps, and begins new rows."""
        if trajectories is self._trajectories:
            return
        slots = np.array(list(map(attrgetter("first_slot"), trajectories)), dtype=np.int64)  # (B,), -1 for new rows
        new = np.flatnonzero(slots < 0).tolist()
        if new:
            begun = [trajectories[place] for place in new]
            self._begin(begun)
            slots[new] = [trajectory.first_slot for trajectory in begun]
        self._slots_of_rows = slots
        name, *others = {trajectory.job.request.options.model for trajectory in trajectories}
        self._model = self._models[name]
        self._is_plain = not others and not self._new[name].facts[IS_SPECIAL, slots].any()
        self._trajectories = trajectories

    def _begin(self, trajectories: list[Trajectory]) -> None:
        for row in trajectories:
            row.first_plan_row = self._first_plan_row(row.options)  # This can replace the table of plans.
        for name, own in by_model(trajectories).items():
            slots = np.array(self._slots[name].next_slots(own), dtype=np.int64)
            self._drop_outdated_graphs()
            self._new[name].begin(own, slots)
            self._slots[name].assign(own)

    def _refill_noise(self, rows: StepRows) -> bool:
        """Draws noise for the rows of each model (see NewRows.refill_noise). Returns True if one model needed it."""
        refilled = False
        for name, new in self._new.items():
            if new.can_use_all_noise:
                places = [place for place, row in enumerate(rows.trajectories) if row.options.model == name]
                refilled |= new.refill_noise([rows.trajectories[place] for place in places], rows.steps[places])
        return refilled

    def _plain_inputs(self, rows: StepRows) -> tuple[tuple[str, Shape], Array]:
        """Returns the graph of a step without special rows, and its inputs."""
        plain, first_step = self._plain, int(rows.steps[0])
        if plain and plain.is_exact and plain.sizes is rows.sizes:
            plain.advance(first_step)
        else:
            call = self._plain_call(rows)
            shape = self._graph_for(call)
            key, is_exact = (call.model.info.name, shape), shape in (call.shape, self._fixed.get(call.model.info.name))
            inputs, increments = call.inputs(shape), call.increments(shape)
            plain = self._plain = PlainStep(rows.sizes, first_step, key, inputs, increments, is_exact)
        return plain.key, plain.inputs

    def _plain_call(self, rows: StepRows) -> Call:
        """Returns the call of a step in which each row has one evaluation, or two if it is guided."""
        model, slots, count = self._model, self._slots_of_rows, len(self._slots_of_rows)
        facts = self._new[model.info.name].facts
        guided = np.flatnonzero(rows.sizes == GUIDED_EVALUATIONS)
        label = np.concatenate([facts[LABEL, slots], np.full(len(guided), model.program.null_label)])
        second = np.arange(count)
        second[guided] = count + np.arange(len(guided))
        plan_row = facts[PLAN_ROW, slots] + rows.steps
        return Call(
            model,
            np.concatenate([slots, slots[guided]]),
            np.concatenate([plan_row, plan_row[guided]]),
            label,
            1 + rows.steps - facts[SKIPPED, slots],
            second,
            has_known=False,
        )

    def _enqueue(self, calls: list[tuple[tuple[str, Shape], Array]], trajectories: list[Trajectory]) -> None:
        """Enqueues the calls and CLIP guidance.

        If the first call fails, no row has changed, and the step can be repeated. If something fails later, some rows
        have changed and others have not, and DeviceLostError is raised.
        """
        is_enqueued = False
        try:
            for key, inputs in calls:
                self._steps.call(key, inputs)
                is_enqueued = True
            if not self._is_plain:
                self._guide(trajectories)
        except Exception as error:
            if not is_enqueued:
                raise
            raise DeviceLostError("only a part of a step was enqueued") from error

    def _inputs(self, trajectories: list[Trajectory]) -> list[tuple[tuple[str, Shape], Array]]:
        """Returns the graphs of the models and their inputs, for any rows."""
        groups = by_model(trajectories).items()
        calls = [self._call_of(self._models[name], part) for name, own in groups for part in self._split(own)]
        shapes = [self._graph_for(call) for call in calls]
        return [((call.model.info.name, s), call.inputs(s)) for call, s in zip(calls, shapes, strict=True)]

    def _split(self, trajectories: list[Trajectory]) -> list[list[Trajectory]]:
        """Splits the rows of one model into calls that fit into the graph of the fixed shape."""
        shape = self._fixed.get(trajectories[0].options.model)
        if not shape:
            return [trajectories]
        parts, rows, further = [list[Trajectory]()], 0, 0
        for trajectory in trajectories:
            num_rows = num_rows_of(trajectory)
            num_further = trajectory.network_evaluations - num_rows
            if rows + num_rows > shape.rows or further + num_further > shape.further:
                parts, rows, further = [*parts, []], 0, 0
            parts[-1].append(trajectory)
            rows, further = rows + num_rows, further + num_further
        return [part for part in parts if part]

    def _call_of(self, model: LoadedModel, trajectories: list[Trajectory]) -> Call:
        slot, plan_row, label, step, second = map(np.array, indices_of(trajectories, model.program.null_label))
        step = step - self._new[model.info.name].facts[SKIPPED, slot[: len(step)]]
        return Call(model, slot, plan_row, label, step, second, any(map(has_known, trajectories)))

    def _graph_for(self, call: Call) -> Shape:
        """Returns the shape of a captured graph for the call.

        If the exact shape is not captured, a larger one is used, and the exact one is captured when the device is idle.
        The exact one is captured now if there is no larger one with at most LARGEST_PADDING times the evaluations, or
        if larger ones were used MOST_LARGER_STEPS times.
        """
        name, exact = call.model.info.name, call.shape
        if shape := self._fixed.get(name):
            if not shape.holds(exact._replace(rows=call.num_rows, further=call.num_further)):
                raise ValueError(f"a step of {call.num_rows} rows exceeds the fixed number of {shape.rows}")
            exact = shape
        if (name, exact) in self._steps:
            return exact
        if (name, exact) not in self._larger:
            captured = [shape for own, shape in self._steps if own == name and shape.holds(exact)]
            smallest = min(captured, key=lambda shape: shape.evaluations, default=None)
            fits = smallest and smallest.evaluations <= LARGEST_PADDING * exact.evaluations
            self._larger[name, exact] = smallest if fits else None
            self._missing.pop((name, exact), None)
            self._missing[name, exact] = None
        larger = self._larger[name, exact]
        self._num_larger[name, exact] += 1
        if larger and self._num_larger[name, exact] <= MOST_LARGER_STEPS:
            return larger
        self._capture(call.model, exact)
        return exact

    def _capture(self, model: LoadedModel, shape: Shape) -> None:
        self._larger.clear()
        self._missing.pop((model.info.name, shape), None)
        self._num_larger.pop((model.info.name, shape), None)
        self._steps.capture((model.info.name, shape), partial(self._run_step, model, shape))

    def _run_step(self, model: LoadedModel, shape: Shape) -> None:
        """Does the work of a step: reads the rows from their slots, and writes the results to the slots."""
        B, N, slots = shape.rows, shape.evaluations, self._slots[model.info.name]
        rows = Rows(*self._steps.inputs[: 3 * N + 2 * B].split([N, N, N, B, B]))
        state = slots.state if shape.has_known else slots.plain_state
        stepped = model.step(state, self._plans.table, rows)
        slots.store(rows.slots, stepped)
        if shape.has_known:
            slots.write_errors(rows.slot, rows.label, stepped.error)

    def _drop_outdated_graphs(self) -> None:
        """Removes the graphs if tensors that they use were replaced by larger ones. They are missing from then on."""
        versions = self._current_versions()
        if versions != self._versions:
            self._versions, self._plain = versions, None
            removed = reversed(list(self._steps))  # the first one was the largest, and is the next to be captured
            self._missing |= dict.fromkeys(removed)
            self._steps.clear()
            for new in self._new.values():
                new.clear()
            self._larger.clear()

    def _guide(self, trajectories: list[Trajectory]) -> None:
        """Enqueues CLIP guidance for the rows that have it in this step. It changes the results of the step."""
        if self.clip:
            for name, own in by_model(trajectories).items():
                if guided := [(row, row.clip) for row in own if row.clip]:
                    self._guide_rows(self.clip.clip, self._slots[name], guided)

    def _guide_rows(self, clip: Clip, of: GraphSlots, guided: list[tuple[Trajectory, ClipTarget]]) -> None:
        """Enqueues CLIP guidance for rows of one model."""
        slots = np.array([row.first_slot for row, _ in guided], dtype=np.int64)  # (M,)
        plan_row = np.array([row.first_plan_row + row.step for row, _ in guided], dtype=np.int64)  # (M,)
        text = np.stack([target.text for _, target in guided])  # (M, E)
        scale = np.array([target.scale for _, target in guided], dtype=np.float32)

        def guide(slots: Tensor, plan_row: Tensor, text: Tensor, scale: Tensor) -> None:
            state = of.state
            b = self._plans.table[plan_row, COLUMN_OF_B]  # (M,)
            stepped = Stepped(state.x_t[slots], state.x_0[slots], scale.new_zeros(0), of.finite[slots])
            chosen = torch.arange(len(slots), device=slots.device)  # (M,)
            of.store(slots, guide_with_clip(clip, stepped, chosen, b, text, scale))

        self._gpu.enqueue(guide, slots, plan_row, text, scale)

    def _read(
        self,
        trajectories: list[Trajectory],
        read: Callable[[GraphSlots, Tensor], Tensor],
        of_row: Callable[[Array], T],
    ) -> Reading[Sequence[T | None]]:
        """Reads 8-bit images (n, H, W[, C]) of each row. `of_row` converts those of one row.

        The images of a row before its first step are black. A row that is not finite has None.
        """
        with torch.inference_mode(), device_errors():
            groups = by_model(trajectories).items()
            parts = [self._read_rows(self._slots[name], own, read, of_row) for name, own in groups]
        return LateReading(trajectories, parts)

    def _read_rows(
        self,
        of: GraphSlots,
        trajectories: list[Trajectory],
        read: Callable[[GraphSlots, Tensor], Tensor],
        of_row: Callable[[Array], T],
    ) -> tuple[Download, Callable[[Tensor], dict[Trajectory, T | None]]]:
        """Reads the images of rows of one model."""
        begun = [trajectory for trajectory in trajectories if trajectory.slots]
        place = {trajectory: i for i, trajectory in enumerate(begun)}
        C, H, W = of.state.x_0.shape[1:]
        slots = np.array([trajectory.slots[0] for trajectory in begun], dtype=np.int64)

        def convert(host: Tensor) -> dict[Trajectory, T | None]:
            values = host.numpy()
            num_images = values.shape[1] // (C * H * W)
            images = values[:, 1:].reshape(len(values), num_images, C, H, W)
            images = images[:, :, 0] if C == 1 else images.transpose(0, 1, 3, 4, 2)  # (n, images, H, W[, C])
            black = np.zeros((2, *images.shape[2:]), dtype=np.uint8)
            results: dict[Trajectory, T | None] = {}
            for trajectory in trajectories:
                at = place.get(trajectory)
                is_finite = at is None or bool(values[at, 0])
                results[trajectory] = of_row(black if at is None else images[at]) if is_finite else None
            return results

        return self._gpu.read(partial(read, of), slots), convert
