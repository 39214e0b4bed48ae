"""Draws digits with a checkpoint, many at once, with the reverse step that the service uses."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import checkpoint
from model.checkpoint import SHIPPED, Checkpoint
from model.compiled.compiler import CompilerError, compiled_step, default_cache
from model.precision import fast_dtype
from model.process import draw
from model.sampler import Guidance, Sampler, plan_through, timesteps_of
from model.schedule import Schedule
from model.step import ReverseStep, Step
from scripts.common.errors import ScriptError
from scripts.common.progress import Reporter

OnStep = Callable[[int, Tensor, Tensor], None]  # (t, x_t, x_0)


@dataclass(frozen=True, slots=True)
class DrawingRequest:
    """The options of `arguments.add_drawing_arguments`. None means the checkpoint's own value."""

    checkpoint: Path = SHIPPED
    sampler: Sampler | None = None
    num_steps: int | None = None
    guidance_scale: float | None = None
    guidance_start: int | None = None
    guidance_stop: int | None = None
    seed: int = 0
    batch_size: int = 64
    compile: str = "auto"  # auto, on or off
    num_threads: int | None = None  # None leaves the number to torch


@dataclass(frozen=True, slots=True)
class DrawingOptions:
    """How digits are drawn."""

    sampler: Sampler
    num_steps: int
    guidance: Guidance

    def evaluations(self, schedule: Schedule) -> int:
        """Of the network, for one image: guidance takes a second one at each step in which it acts."""
        timesteps = timesteps_of(schedule, self.sampler, self.num_steps)[:-1]
        return len(timesteps) + sum(self.guidance.acts_at(t) for t in timesteps)


def step_cache() -> Path:
    """The folder where the service keeps compiled steps, which scripts share."""
    return Path(os.environ.get("UNFOG_CACHE_DIR") or default_cache())


class Drawer:
    """Draws images with a checkpoint, by the same steps as the service.

    A compiled step draws faster on a CPU. It rounds differently, so the last bits of the images differ.
    """

    def __init__(self, loaded: Checkpoint, device: torch.device | None = None) -> None:
        self.checkpoint, self.compiled = loaded, False
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = fast_dtype(self.device)
        self._program = ReverseStep(loaded, self.device, self.dtype)
        self._step: Step = self._program

    def compile(self, mode: str, reporter: Reporter) -> None:
        """Switches to the compiled step if `mode` says so; ScriptError if the mode is `on` and compiling fails.

        `auto` compiles on a CPU only, as in the service. If compiling fails, it reports why and keeps the step
        uncompiled. Compiling takes 30 to 60 seconds, so call this after everything else that can fail.
        """
        if mode == "off" or (mode == "auto" and self.device.type != "cpu"):
            return
        try:
            with _log_shown(reporter):
                self._step = compiled_step(self._program, step_cache())
            self.compiled = True
        except CompilerError as error:
            if mode == "on":
                raise ScriptError(f"--compile on: {error}") from error
            reporter.line(f"Drawing without a compiled step, which is slower: {error}")

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the checkpoint can draw."""
        return self.checkpoint.config.class_names

    @property
    def facts(self) -> dict[str, Any]:
        """Everything except options and seed that decides the pixels, for JSON files."""
        return {
            "weights_sha256": self.checkpoint.weights_sha256,
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "compiled": self.compiled,
        }

    def draw(
        self,
        y: Tensor,
        index: Tensor,
        options: DrawingOptions,
        reporter: Reporter,
        *,
        seed: int,
        batch_size: int = 64,
        timesteps: list[int] | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Returns images (N, C, H, W) in [-1, 1] on the CPU for labels y and indices (N,), the same for the same seed.

        `timesteps` falls to 0 and replaces the timesteps of num_steps. `on_step(t, x_t, x_0)` is called for each batch
        at each step. Raises ScriptError if a step that is compiled on its first call, as on a GPU, cannot be compiled.
        """
        timesteps = timesteps or timesteps_of(self.checkpoint.schedule, options.sampler, options.num_steps)
        plan = plan_through(self.checkpoint.schedule, options.sampler, timesteps)
        y, index, x_0 = y.to(self.device), index.to(self.device), []
        with _compiler_errors(), reporter.task(f"drawing {len(y)} images", len(y) * options.num_steps, "steps") as task:

            def step(k: int, x_t: Tensor, predicted_x_0: Tensor) -> None:
                task.advance(len(x_t))
                if on_step:
                    on_step(plan.timesteps[k], x_t, predicted_x_0)

            for rows in torch.arange(len(y), device=self.device).split(batch_size):
                keys = {"seed": torch.full_like(rows, seed), "index": index[rows], "y": y[rows]}
                drawn = draw(
                    self._step,
                    [plan] * len(rows),
                    self.checkpoint.image_shape,
                    **keys,
                    guidance=options.guidance,
                    on_step=step,
                )
                x_0.append(drawn.cpu())
        return torch.cat(x_0)


class _Lines(logging.Handler):
    """Shows log records as a reporter's lines."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__(logging.INFO)
        self._reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        """Shows the message."""
        self._reporter.line(record.getMessage())


@contextmanager
def _log_shown(reporter: Reporter) -> Iterator[None]:
    """Shows what `model` logs: that it compiles now, how long that took, or why a cached step is not used."""
    log, handler = logging.getLogger("model"), _Lines(reporter)
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


@contextmanager
def _compiler_errors() -> Iterator[None]:
    try:
        yield
    except CompilerError as error:
        raise ScriptError(f"--compile on: {error}") from error


def open_drawer(request: DrawingRequest) -> Drawer:
    """Sets the number of threads and loads the checkpoint. The step is not compiled yet. Raises CheckpointError."""
    if request.num_threads:
        torch.set_num_threads(request.num_threads)
    return Drawer(checkpoint.load(request.checkpoint))


def options_from(request: DrawingRequest, loaded: Checkpoint) -> DrawingOptions:
    """Returns the requested options, with the checkpoint's own for those that are None.

    Raises ScriptError for options that the checkpoint does not permit.
    """
    T = loaded.schedule.num_steps
    num_steps, permitted = request.num_steps or loaded.config.recommended_steps, loaded.config.steps
    if num_steps > T:
        raise ScriptError(f"--num-steps {num_steps} is too many: this checkpoint has {T} steps")
    if permitted and num_steps not in permitted:
        raise ScriptError(f"this checkpoint draws in {' or '.join(map(str, permitted))} steps, not in {num_steps}")
    sampler = request.sampler or loaded.config.samplers[0]
    if sampler not in loaded.config.samplers:
        raise ScriptError(f"this checkpoint does not permit --sampler {sampler}")
    return DrawingOptions(sampler, num_steps, _guidance_from(request, loaded, sampler))


def _guidance_from(request: DrawingRequest, loaded: Checkpoint, sampler: Sampler) -> Guidance:
    own, T = loaded.config.guidance_of(sampler), loaded.schedule.num_steps
    scale = own.scale if request.guidance_scale is None else request.guidance_scale
    start, stop = request.guidance_start or own.start, request.guidance_stop or own.stop
    if scale != 1 and not loaded.config.guidable:
        raise ScriptError(
            "this checkpoint cannot be guided: no label was dropped in its training, so --guidance-scale must be 1"
        )
    if scale == 1 and (request.guidance_start or request.guidance_stop):
        raise ScriptError("guidance is off: give a --guidance-scale above 1, or neither --guidance-start nor -stop")
    if start > stop or max(request.guidance_start or 1, request.guidance_stop or 1) > T:
        raise ScriptError(f"--guidance-start must not lie above --guidance-stop, nor either of them above {T}")
    return Guidance(scale, start, stop)
