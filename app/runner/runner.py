"""The runner: computes one reverse step for a batch of rows, and keeps the state of the rows on the device.

The docstring of app/engine/job.py explains rows, slots, plans and evaluations.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from app.engine.interface import DeviceLostError, ModelInfo, Reading, Ready, RunnerError
from app.engine.job import Input, Options, Pixels, StepRows, Trajectory
from app.engine.step_times import StepTimes
from app.runner.clip import ClipModel
from app.runner.device import device_errors
from app.runner.device_state import Plans, Slots, by_model, labels_of, num_rows_of, rows_of
from app.runner.loaded_model import LoadedFile, LoadedModel
from app.runner.threads import ComputeThreads
from app.runner.transfers import Transfers
from app.runner.warm_up import check_probe_image, measure_clip_call, measure_step_times
from model.clip_guidance import guide_with_clip
from model.compiled.compiler import CompilerError, compiled_step
from model.compiled.kernel_cache import prepare_kernel_cache
from model.compiled.memory import return_freed_memory
from model.noise import normal
from model.pipelines.sampling import TorchNoise
from model.pipelines.schedulers import COLUMNS
from model.pipelines.step import PipelineState, PipelineStep
from model.pixels import to_pixels
from model.sampler import COLUMN_OF_B
from model.step import Rows, Stepped

log = logging.getLogger(__name__)

BATCHES = (1, 2, 4, 8, 16, 32, 64)  # the numbers of rows for which warm-up measures the step time
STEPS_UNTIL_TRIM = 1000  # after this number of steps, freed memory is returned to the kernel
FIRST_PIPELINE_SLOTS = 8  # fewer, because a slot for 256 x 256 pixels takes 3.3 MB
FIRST_SLOTS = sum(BATCHES)  # the initial number of slots: the number that warm-up needs at the same time


@contextmanager
def compiler_errors() -> Iterator[None]:
    """Translates CompilerError into RunnerError. On a GPU, a step raises it in its first calls, which compile it."""
    try:
        yield
    except CompilerError as error:
        raise RunnerError(f"UNFOG_COMPILE=on: {error}") from error


class Runner:
    """Holds the networks and the state of the images. Each image that has started has a slot on the device.

    Each model has slots of its own, because the images of two models can have different shapes. The first model is the
    default.

    The state is float32. Only the inputs of the networks are cast to the dtype. A step writes the state after
    everything else has succeeded, so that a failed step can be repeated with fewer rows.
    """

    def __init__(
        self,
        models: Mapping[str, LoadedFile],
        device: torch.device,
        dtype: torch.dtype,
        threads: ComputeThreads | None = None,
        *,
        clip: ClipModel | None = None,
        dtype_of_pipelines: torch.dtype = torch.float32,
        threads_of_pipelines: int = 1,
    ) -> None:
        """`dtype` and `threads` apply to checkpoints. Both numbers of threads apply on a CPU only."""
        self.clip = clip
        self.network_seconds = 0.0  # time spent in network calls
        self._num_steps = 0
        self.threads = threads or ComputeThreads((torch.get_num_threads(),))
        self._transfers = Transfers(device)
        self.device, self.default_model = device, next(iter(models))
        self._threads_of_pipelines = threads_of_pipelines if device.type == "cpu" else None
        dtypes = {name: dtype_of_pipelines if loaded.spec.is_pipeline else dtype for name, loaded in models.items()}
        self._models = {name: LoadedModel(name, loaded, device, dtypes[name]) for name, loaded in models.items()}
        self._torch_noise: dict[Trajectory, TorchNoise] = {}  # of the rows that draw their noise with torch
        # All tensors are made in inference mode, because a compiled step distinguishes inference tensors from others.
        with torch.inference_mode():
            self._plans = self._new_plans()
            self._plans_of = {name: self._new_plans_of(info) for name, info in self.models.items()}
            self._slots = {name: self._new_slots(info) for name, info in self.models.items()}

    def _new_plans(self) -> Plans:
        return Plans(self.device)

    def _new_plans_of(self, info: ModelInfo) -> Plans:
        """Returns the plans of a model. Those of all checkpoints are in one table."""
        return Plans(self.device, columns=len(COLUMNS)) if info.is_pipeline else self._plans

    def _new_slots(self, info: ModelInfo) -> Slots:
        if info.is_pipeline:
            return Slots(
                FIRST_PIPELINE_SLOTS,
                info.image_shape,
                self.device,
                self._transfers,
                num_labels=1 + info.num_classes,
                kind=PipelineState,
            )
        return Slots(FIRST_SLOTS, info.image_shape, self.device, self._transfers, num_labels=1 + info.num_classes)

    def compile(self, cache: Path, *, must: bool) -> bool:
        """Compiles the step of each model, except pipelines on a GPU. Returns True if every compilation succeeds.

        If a step cannot be compiled and `must` is True, raises RunnerError. If `must` is False, the model then runs
        without compilation.
        """
        if on_gpu := self.device.type == "cuda":
            with compiler_errors():
                prepare_kernel_cache(cache)
        models = [model for model in self._models.values() if not (on_gpu and model.info.is_pipeline)]
        for model in models:
            try:
                with self.threads.exactly(self._threads_of_pipelines if model.info.is_pipeline else None):
                    model.use(compiled_step(model.program, cache))
            except CompilerError as error:
                if must:
                    raise RunnerError(f"UNFOG_COMPILE=on: {error}") from error
                # The field is not named `model`, because the console omits the fields of this name (see app/logs.py).
                log.warning(
                    "Model not compiled, steps take longer", extra={"checkpoint": model.info.name, "reason": str(error)}
                )
        return all(model.info.compiled for model in models)

    @property
    def max_rows(self) -> int | None:
        """Returns None: the number of rows has no limit."""
        return None

    @property
    def steps_ahead(self) -> int:
        """Returns 0, because `step` waits for the device."""
        return 0

    @property
    def has_idle_work(self) -> bool:
        """Returns False, because this runner has no idle work."""
        return False

    def idle(self) -> None:
        """Does nothing."""

    @property
    def models(self) -> dict[str, ModelInfo]:
        """Returns the served models by name."""
        return {name: model.info for name, model in self._models.items()}

    @property
    def device_memory(self) -> Callable[[], int] | None:
        """Returns a function that returns the number of bytes reserved on the GPU, or None without a GPU."""
        return partial(torch.cuda.memory_reserved, self.device) if self.device.type == "cuda" else None

    def step(self, rows: StepRows, before_call: Callable[[], None] = lambda: None) -> list[Trajectory]:
        """Runs one reverse step of each row, with one call of each network. Returns the rows that are not finite.

        `before_call` is called immediately before each network call.

        Raises OutOfMemoryError or DeviceLostError for device errors. Any other error is a bug.
        """
        start, on_core = time.perf_counter(), time.thread_time()
        not_finite = self._step(by_model(rows.trajectories), before_call)
        self.threads.observe(time.perf_counter() - start, time.thread_time() - on_core)
        self._num_steps += 1
        if self._num_steps % STEPS_UNTIL_TRIM == 0:
            return_freed_memory()
        return not_finite

    @torch.inference_mode()
    def _step(
        self, rows_of_models: Mapping[str, list[Trajectory]], before_call: Callable[[], None]
    ) -> list[Trajectory]:
        """Runs `step`. Computes all results, and so allocates all memory, before the first write of state."""
        rows = list(chain(*rows_of_models.values()))
        with device_errors():
            self._begin([trajectory for trajectory in rows if not trajectory.slots])
            parts = [self._call(self._models[name], own, before_call) for name, own in rows_of_models.items()]
            read = self._transfers.start_download(torch.cat([part.finite for part in parts]))
            self._commit(parts)
        try:
            flags = read().tolist()
        except Exception as error:
            raise DeviceLostError("a step failed after it was enqueued on the device") from error
        if all(flags):
            return []
        of_rows = iter(flags)
        return [row for row in rows if not all(list(islice(of_rows, num_rows_of(row))))]

    def _call(self, model: LoadedModel, trajectories: list[Trajectory], before_call: Callable[[], None]) -> "_Part":
        """Calls one network. Returns the results of the rows."""
        rows, slots = rows_of(trajectories, model.program.null_label, self._transfers), self._slots[model.info.name]
        plans, is_pipeline = self._plans_of[model.info.name], model.info.is_pipeline
        if is_pipeline:
            self._give_torch_noise(slots, plans, trajectories)
        before_call()
        start = time.perf_counter()
        with self.threads.exactly(self._threads_of_pipelines if is_pipeline else None):
            stepped = model.step(slots.state, plans.table, rows)
        stepped = self._guide_with_clip(stepped, rows, trajectories)
        self.network_seconds += time.perf_counter() - start
        errors = None
        if any(trajectory.comparison for trajectory in trajectories):
            errors = rows.slot, rows.label, stepped.error
        return _Part(slots, rows.slots, stepped.x_prev, stepped.x_0, stepped.finite, errors)

    def _guide_with_clip(self, stepped: Stepped, rows: Rows, trajectories: list[Trajectory]) -> Stepped:
        """Returns the results of a network call with CLIP guidance for the rows that have it in this step."""
        if self.clip is None or all(trajectory.job.request.clip is None for trajectory in trajectories):
            return stepped
        places = accumulate(map(num_rows_of, trajectories), initial=0)  # of the first row of each trajectory
        guided = [(place, own.clip) for place, own in zip(places, trajectories, strict=False) if own.clip]
        if not guided:
            return stepped
        chosen, upload = self._transfers.upload([place for place, _ in guided]), self._transfers.upload
        plans = self._plans_of[trajectories[0].options.model]
        b = plans.table[rows.plan_row[chosen], COLUMN_OF_B]  # (M,)
        text = self._transfers.upload_array(np.stack([clip.text for _, clip in guided]))  # (M, E)
        scale = upload([clip.scale for _, clip in guided], torch.float32)  # (M,)
        return guide_with_clip(self.clip.clip, stepped, chosen, b, text, scale)

    def _commit(self, parts: "list[_Part]") -> None:
        """Writes the results of a step to the slots.

        If the first write fails, no state has changed, and the step can be repeated. If a later write fails, the state
        is inconsistent, and DeviceLostError is raised.
        """
        is_written = False
        try:
            for part in parts:
                for name in ("x_t", "x_0"):
                    part.of.write(part.slots, **{name: getattr(part, name)})
                    is_written = True
                if part.errors:
                    part.of.write_errors(*part.errors)
        except Exception as error:
            if not is_written:
                raise
            raise DeviceLostError("only a part of a step's results was written") from error

    @torch.inference_mode()
    def pixels(self, trajectories: list[Trajectory]) -> Reading[Sequence[Pixels | None]]:
        """Reads the current prediction of x_0 of each image, as 8-bit pixels. It is black before the first step."""
        return Ready([x_0 for (x_0,) in self._read_images(trajectories, "x_0")])

    @torch.inference_mode()
    def pixels_with_x_t(self, trajectories: list[Trajectory]) -> Reading[Sequence[tuple[Pixels, Pixels] | None]]:
        """Reads the current prediction of x_0 and the current x_t of each image, as 8-bit pixels.

        Reads both with one transfer. Both are black for an image before its first step.
        """
        return Ready([(x_0, x_t) for x_0, x_t in self._read_images(trajectories, "x_0", "x_t")])

    def _read_images(self, trajectories: list[Trajectory], *names: str) -> list[tuple[Pixels, ...]]:
        """Returns the images of each trajectory as 8-bit pixels, for the tensors of the state with these names."""
        images = dict[Trajectory, tuple[Pixels, ...]]()
        with device_errors():
            for model, own in by_model(trajectories).items():
                images |= self._read_images_of(self._slots[model], own, names)
        return [images[trajectory] for trajectory in trajectories]

    def _read_images_of(
        self, slots: Slots, trajectories: list[Trajectory], names: Sequence[str]
    ) -> dict[Trajectory, tuple[Pixels, ...]]:
        """Returns the images of the trajectories of one model."""
        states = [getattr(slots.state, name) for name in names]  # (slots, C, H, W) each
        begun = [trajectory for trajectory in trajectories if trajectory.slots]
        places = slots.of(begun)  # (B,)
        parts = [state[places] for state in states]
        if len(begun) < len(trajectories):
            black = torch.full_like(states[0][:1], -1)  # (1, C, H, W), for images before their first step
            parts = [torch.cat([part, black]) for part in parts]
        levels = to_pixels(torch.cat(parts) if len(parts) > 1 else parts[0])
        layout = "(s b) 1 h w -> b s h w" if levels.shape[1] == 1 else "(s b) c h w -> b s h w c"
        images = self._transfers.download(rearrange(levels, layout, s=len(states)).contiguous()).numpy()
        place = {trajectory: i for i, trajectory in enumerate(begun)}
        return {trajectory: tuple(images[place.get(trajectory, -1)]) for trajectory in trajectories}

    @torch.inference_mode()
    def errors(self, trajectories: list[Trajectory]) -> Reading[Sequence[Sequence[float] | None]]:
        """Reads the errors of the remaining classes in the last step, for rows that compare the classes."""
        errors = dict[Trajectory, list[float]]()
        with device_errors():
            for model, own in by_model(trajectories).items():
                evaluations = [
                    (slot, label) for trajectory in own for slot, labels in labels_of(trajectory, 0) for label in labels
                ]
                slots, labels = self._transfers.upload([index for pair in evaluations for index in pair]).view(-1, 2).T
                values = iter(self._transfers.download(self._slots[model].error[slots, labels]).tolist())
                errors |= {trajectory: list(islice(values, trajectory.network_evaluations)) for trajectory in own}
        return Ready([errors[trajectory] for trajectory in trajectories])

    def release(self, trajectories: list[Trajectory]) -> None:
        """Releases the slots of the trajectories that have one."""
        for trajectory in trajectories:
            self._torch_noise.pop(trajectory, None)
        for model, own in by_model(trajectories).items():
            self._slots[model].release(own)

    @compiler_errors()
    def warm_up(self, should_stop: Callable[[], bool]) -> StepTimes:
        """Tests each model with its probe image, then measures the step times of each architecture.

        The times are measured with each permitted number of threads, and the fastest ones are returned. If another
        process uses a core during warm-up, all threads wait for each other, and their times do not show which batch
        size is best. Raises RunnerError if a probe image differs.
        """
        self._make_rows_independent()
        # With the smallest number of threads, a step is fast even if one core is busy.
        with self.threads.fixed(self.threads.counts[-1]):
            self.check()
        measured = []
        for count in self.threads.counts:
            with self.threads.fixed(count):
                measured.append(self._measure(should_stop))
        return min(measured, key=lambda times: times.step_seconds(self.batches[-1]))

    def _make_rows_independent(self) -> None:
        """Gives the rows of a pipeline their own calls on a CPU if their bits would depend on their place in a call."""
        for model in self._models.values():
            if self._threads_of_pipelines and isinstance(model.program, PipelineStep):
                with self.threads.exactly(self._threads_of_pipelines):
                    if not model.program.has_independent_rows():
                        log.info(
                            "Rows of a call are not independent, using one uncompiled call for each",
                            extra={"checkpoint": model.info.name},
                        )
                        model.program.use_single_rows()
                        model.use(model.program, compiled=False)

    def _measure(self, should_stop: Callable[[], bool]) -> StepTimes:
        """Measures the step times. Models with the same network as the default model have the same times."""
        seconds, default = dict[str, dict[int, float]](), self._models[self.default_model]
        for name, model in self._models.items():
            has_other_network = model.loaded.architecture != default.loaded.architecture
            if name == self.default_model or has_other_network or model.info.compiled is not default.info.compiled:
                seconds[name] = self._measure_model(model, should_stop)
        largest = max((info.image_shape for info in self.models.values()), key=math.prod)
        clip_seconds = measure_clip_call(self.clip.clip, largest, should_stop) if self.clip else 0.0
        return StepTimes(seconds.pop(self.default_model), clip_seconds, seconds)

    def _measure_model(self, model: LoadedModel, should_stop: Callable[[], bool]) -> dict[int, float]:
        """Returns the seconds of a step of one model by its number of rows.

        On a CPU, a step of a pipeline takes the time of its calls, which all have the same number of rows.
        """
        name, most = model.info.name, model.program.call_rows.most
        if not model.info.is_pipeline or most is None:
            return measure_step_times(self, name, self._time_step, self.batches, should_stop)
        (seconds,) = measure_step_times(self, name, self._time_step, (most,), should_stop).values()
        return {rows: math.ceil(rows / most) * seconds for rows in self.batches}

    def check(self) -> None:
        """Generates the probe image of each model. Raises RunnerError if one differs from the stored image."""
        for model in self._models.values():
            check_probe_image(self, model)

    def _time_step(self, trajectories: list[Trajectory]) -> tuple[float, float]:
        """Runs a step. Returns its duration, and the part of it in which this thread had a core.

        On a GPU both values are the whole duration.
        """
        self._wait_for_device()
        start, on_core = time.perf_counter(), time.thread_time()
        self.step(StepRows.of(trajectories))
        self._wait_for_device()
        seconds, on_core = time.perf_counter() - start, time.thread_time() - on_core
        return seconds, on_core if self.device.type == "cpu" else seconds

    @property
    def batches(self) -> tuple[int, ...]:
        """Returns the numbers of rows for which warm-up measures the step time."""
        return BATCHES

    def _wait_for_device(self) -> None:
        self._transfers.wait()

    def _begin(self, trajectories: list[Trajectory]) -> None:
        """Assigns slots to the trajectories and writes their first x_t and their options there."""
        for model, own in by_model(trajectories).items():
            self._begin_rows(self._slots[model], self._models[model].info.image_shape, own)

    def _begin_rows(self, slots: Slots, image_shape: tuple[int, int, int], trajectories: list[Trajectory]) -> None:
        """Begins rows of one model."""
        rows = [trajectory for trajectory in trajectories for _ in range(trajectory.num_slots)]
        options = [row.options for row in rows]
        for row in trajectories:
            row.first_plan_row = self._first_plan_row(row.options)
        seed, index = map(self._transfers.upload, zip(*(row.noise_key for row in rows), strict=True))  # (B,) each
        z = normal(seed, index, torch.zeros_like(seed), image_shape)  # (B, C, H, W)
        more = dict[str, Tensor]()
        if self._models[rows[0].options.model].info.is_pipeline:
            z = self._first_noise_of_pipeline(rows, z)
            more["has_z"] = self._transfers.upload([o.noise == "torch" for o in options], torch.bool)  # (B,)
        scale = self._transfers.upload([o.guidance_scale for o in options], torch.float32)  # (B,)
        slots.begin(
            trajectories,
            x_0=torch.zeros_like(z),
            seed=seed,
            index=index,
            guidance_scale=scale,
            **self._images_of([row.input for row in rows], z),
            **more,
        )

    def _first_plan_row(self, options: Options) -> int:
        """Returns the row of the first step of these options in the table of plans."""
        return self._plans_of[options.model].start_of(options, self._models[options.model].loaded.plan)

    def _first_noise_of_pipeline(self, rows: list[Trajectory], z: Tensor) -> Tensor:
        """Returns the noise of the first x_t of rows of a pipeline, given the noise z (B, C, H, W) of this service."""
        for place, row in enumerate(rows):
            if row.options.noise == "torch":
                seed, index = row.noise_key
                self._torch_noise[row] = noise = TorchNoise(
                    seed + index, self._models[row.options.model].info.image_shape
                )
                z[place] = noise.draw(0)[0].to(self.device)
        plans = self._plans_of[rows[0].options.model]
        factors = self._transfers.upload([plans.first_x_t[row.first_plan_row] for row in rows], torch.float32)  # (B,)
        return z * factors[:, None, None, None]

    def _give_torch_noise(self, slots: Slots, plans: Plans, trajectories: list[Trajectory]) -> None:
        """Writes the noise of the next step of the rows that draw it with torch to their slots."""
        drawing = [trajectory for trajectory in trajectories if trajectory in self._torch_noise]
        for row in drawing:
            is_noisy = plans.is_noisy[row.first_plan_row]
            if is_noisy[row.step]:
                z = self._torch_noise[row].draw(1 + sum(is_noisy[: row.step]))  # (1, C, H, W)
                slots.write(slots.of([row]), z=z.to(self.device))

    def _images_of(self, inputs: list[Input | None], z: Tensor) -> dict[str, Tensor]:
        """Returns x_t, known and is_known (B, C, H, W) of new rows. z (B, C, H, W) is their noise."""
        given = [(place, own) for place, own in enumerate(inputs) if own]
        x_t, known, is_known = z, torch.zeros_like(z), torch.zeros_like(z, dtype=torch.bool)
        if given:
            places = self._transfers.upload([place for place, _ in given])
            image = self._transfers.upload_array(np.stack([own.image for _, own in given]))
            factors = [
                self._transfers.upload([getattr(own, name) for _, own in given], torch.float32)
                for name in ("signal", "noise")
            ]
            signal, noise = (factor[:, None, None, None] for factor in factors)
            every = np.zeros_like(given[0][1].image, dtype=np.bool_)
            mask = np.stack([every if own.is_known is None else own.is_known for _, own in given])
            x_t = z.index_copy(0, places, signal * image + noise * z[places])
            known = known.index_copy(0, places, image)
            is_known = is_known.index_copy(0, places, self._transfers.upload_array(mask))
        return {"x_t": x_t, "known": known, "is_known": is_known}


class _Part(NamedTuple):
    """The results of one network call for the rows of one model."""

    of: Slots
    slots: Tensor  # (B,)
    x_t: Tensor  # (B, C, H, W): x_prev of the step
    x_0: Tensor  # (B, C, H, W)
    finite: Tensor  # (B,)
    errors: tuple[Tensor, Tensor, Tensor] | None  # slot, label, error (N,); None if not needed
