"""Generates digits with a checkpoint in batches, with the same denoising step as the service."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.logs import extra_of
from model import checkpoint
from model.checkpoint import Checkpoint, CheckpointConfig
from model.clip import EMBEDDED_NAME, Clip, ClipError, name_without_folders
from model.clip_guidance import ClipGuidance, ClipGuidedStep
from model.compiled.compiler import CompilerError, compiled_step
from model.compiled.private_cache import default_cache
from model.paths import timesteps_of
from model.precision import fast_dtype
from model.process import Start, draw
from model.prompts import default_prompt
from model.sampler import plan_through
from model.schedule import Schedule
from model.spec import SHIPPED, Guidance, Sampler
from model.step import ReverseStep, Step
from scripts.common.errors import ScriptError
from scripts.common.mnist import NUM_CLASSES
from scripts.common.progress import Reporter

OnStep = Callable[[int, Tensor, Tensor], None]  # (t, x_t, x_0)


@dataclass(frozen=True, slots=True)
class DrawingRequest:
    """Values of the options of `arguments.add_drawing_arguments`. None means the value in the checkpoint."""

    checkpoint: Path = SHIPPED
    sampler: Sampler | None = None
    num_steps: int | None = None
    guidance_scale: float | None = None
    guidance_start: int | None = None
    guidance_stop: int | None = None
    clip_guidance_scale: float = 0.0
    clip_prompt: str | None = None  # None means the default prompt of each digit
    clip_model: str | None = None  # None means the model that ships with unfog
    seed: int = 0
    batch_size: int = 64
    compile: str = "auto"  # auto, on or off
    num_threads: int | None = None  # None means torch's default


@dataclass(frozen=True, slots=True)
class ClipOptions:
    """CLIP guidance and the CLIP model that computes its gradient."""

    guidance: ClipGuidance
    prompt: str | None  # None means the default prompt of each class
    model: str  # name of the model, see model.clip.Clip
    sha256: str  # digest of the weights of the model

    def prompt_of(self, class_name: str) -> str:
        """Returns the prompt for the images of a class. By default it is that of the service."""
        return default_prompt(class_name) if self.prompt is None else self.prompt


@dataclass(frozen=True, slots=True)
class DrawingOptions:
    sampler: Sampler
    num_steps: int
    guidance: Guidance
    clip: ClipOptions | None = None  # None means no CLIP guidance

    @property
    def facts(self) -> dict[str, Any]:
        """Returns the options as a JSON object. Without CLIP guidance, it has no field `clip`.

        The name of a CLIP model has no folders, because the object is published and compared with that of other runs.
        """
        facts = {name: value for name, value in asdict(self).items() if name != "clip" or value is not None}
        if self.clip:
            facts["clip"]["model"] = name_without_folders(self.clip.model)
        return facts

    def evaluations(self, schedule: Schedule) -> int:
        """Returns the number of network evaluations for one image. A step with guidance needs two evaluations."""
        timesteps = timesteps_of(schedule, self.sampler, self.num_steps)[:-1]
        return len(timesteps) + sum(self.guidance.acts_at(t) for t in timesteps)


def step_cache() -> Path:
    """Returns the folder of compiled steps, which scripts share with the service."""
    return Path(os.environ.get("UNFOG_CACHE_DIR") or default_cache())


class Drawer:
    """Generates images with a checkpoint, with the same denoising step as the service.

    A compiled step is faster on a CPU. It rounds differently, and the differences grow over the steps, so that the
    images differ.
    """

    def __init__(self, loaded: Checkpoint, device: torch.device | None = None) -> None:
        self.checkpoint, self.compiled = loaded, False
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = fast_dtype(self.device)
        self._program = ReverseStep(loaded, self.device, self.dtype)
        self.step: Step = self._program

    def compile(self, mode: str, reporter: Reporter) -> None:
        """Compiles the denoising step, depending on `mode`. Raises ScriptError if `mode` is `on` and compilation fails.

        `auto` compiles on a CPU only, as in the service. If that fails, it reports the reason and keeps the uncompiled
        step. Compilation takes 30 to 60 seconds, so call this after all other checks.
        """
        if mode == "off" or (mode == "auto" and self.device.type != "cpu"):
            return
        try:
            with _show_model_log(reporter):
                self.step = compiled_step(self._program, step_cache())
            self.compiled = True
        except CompilerError as error:
            if mode == "on":
                raise ScriptError(f"--compile on: {error}") from error
            reporter.line(f"not compiled, so generating images is slower: {error}")

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.checkpoint.config.class_names

    @property
    def facts(self) -> dict[str, Any]:
        """Returns the facts that determine the pixels, except options and seed, for JSON files."""
        return {
            "weights_sha256": self.checkpoint.weights_sha256,
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "compiled": self.compiled,
        }

    def draw(  # noqa: PLR0913 # most are optional
        self,
        y: Tensor,
        index: Tensor,
        options: DrawingOptions,
        reporter: Reporter,
        *,
        seed: int,
        batch_size: int = 64,
        timesteps: list[int] | None = None,
        start: Start | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Returns images (N, C, H, W) in [-1, 1] on the CPU for labels `y` and indices `index` (N,).

        The same seed gives the same images. `timesteps`, if given, replaces the timesteps of num_steps. It is a path of
        `plan_through`. `start` has the N images to start from; None means noise. `on_step(t, x_t, x_0)` is called for
        each batch at each step, with the predicted x_0. On a GPU, the step is compiled at the first call. Raises
        ScriptError if that fails.
        """
        timesteps = timesteps or timesteps_of(self.checkpoint.schedule, options.sampler, options.num_steps)
        plan = plan_through(self.checkpoint.schedule, options.sampler, timesteps)
        text = None if options.clip is None else self._embedded_prompts(options.clip, y.tolist())  # (N, E)
        y, index, x_0 = y.to(self.device), index.to(self.device), []
        title, total = f"generating {len(y)} image{'' if len(y) == 1 else 's'}", len(y) * plan.num_steps
        with _compiler_errors(), reporter.task(title, total, "steps") as task:

            def step(k: int, x_t: Tensor, predicted_x_0: Tensor) -> None:
                task.advance(len(x_t))
                if on_step:
                    on_step(plan.timesteps[k], x_t, predicted_x_0)

            for rows in torch.arange(len(y), device=self.device).split(batch_size):
                drawn = draw(
                    self.step if text is None else self._clip_guided(options, text[rows]),
                    [plan] * len(rows),
                    self.checkpoint.image_shape,
                    seed=torch.full_like(rows, seed),
                    index=index[rows],
                    y=y[rows],
                    null_label=self.checkpoint.network.null_label,
                    guidance=options.guidance,
                    start=start and start.rows(rows),
                    on_step=step,
                )
                x_0.append(drawn.cpu())
        return torch.cat(x_0)

    def _embedded_prompts(self, clip: ClipOptions, digits: list[int]) -> Tensor:
        """Returns the embedding of the prompt of each image, (N, E)."""
        prompts = {digit: clip.prompt_of(self.class_names[digit]) for digit in digits}
        # Each prompt is embedded alone, because the number of prompts in a call changes the order of float32 sums.
        # It is embedded on the CPU, as in the service, because a GPU rounds differently.
        embed = load_clip(clip.model).embed_prompts
        embedded = {prompt: embed([prompt])[0] for prompt in prompts.values()}
        return torch.stack([embedded[prompts[digit]] for digit in digits]).to(self.device)

    def _clip_guided(self, options: DrawingOptions, text: Tensor) -> Step:
        """Returns the step for a batch whose prompts have the embeddings `text` (B, E)."""
        assert options.clip is not None
        return ClipGuidedStep(self.step, load_clip(options.clip.model, self.device), options.clip.guidance, text)


@cache
def load_clip(name: str = EMBEDDED_NAME, device: torch.device | None = None) -> Clip:
    """Loads a CLIP model, once per process. Raises ScriptError if it cannot be loaded."""
    try:
        return Clip(name, device)
    except ClipError as error:
        raise ScriptError(str(error)) from error


class _ReporterHandler(logging.Handler):
    """Log handler that prints each record, with the fields of `extra`, as a line of a reporter."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__(logging.INFO)
        self._reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        fields = (f"{name}={value}" for name, value in extra_of(record).items())
        self._reporter.line(" ".join([record.getMessage(), *fields]))


@contextmanager
def _show_model_log(reporter: Reporter) -> Iterator[None]:
    """Prints the log of the package `model`: start and duration of a compilation, or why a cached step is not used."""
    log, handler = logging.getLogger("model"), _ReporterHandler(reporter)
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
    """Sets the number of threads and loads the checkpoint. Does not compile. Raises CheckpointError."""
    if request.num_threads:
        torch.set_num_threads(request.num_threads)
    return Drawer(checkpoint.load(request.checkpoint))


def open_digit_drawer(request: DrawingRequest, reporter: Reporter) -> Drawer:
    """Loads and compiles a checkpoint with a null label and ten classes of 28x28 images, as the evaluations need it.

    Raises CheckpointError, or ScriptError for another checkpoint.
    """
    drawer = open_drawer(request)
    if drawer.checkpoint.image_shape != (1, 28, 28) or drawer.checkpoint.network.null_label != NUM_CLASSES:
        raise ScriptError(
            f"{request.checkpoint} cannot be used: the checkpoint must have {NUM_CLASSES} classes and images of 1x28x28"
        )
    drawer.compile(request.compile, reporter)
    return drawer


def options_from(request: DrawingRequest, loaded: Checkpoint) -> DrawingOptions:
    """Returns the requested options. An option that is None gets its value from the checkpoint.

    Raises ScriptError for options that the checkpoint does not permit.
    """
    options = _without_clip(request, loaded.config)
    return replace(options, clip=_clip_from(request)) if request.clip_guidance_scale else options


def check_options(request: DrawingRequest) -> None:
    """Raises the errors of `options_from`. Reads only the metadata of the checkpoint, and does not load CLIP."""
    _without_clip(request, checkpoint.read_config(request.checkpoint))


def check_guidable(config: CheckpointConfig) -> None:
    """Raises ScriptError if the checkpoint does not support guidance."""
    if not config.guidable:
        raise ScriptError(
            "The checkpoint does not support guidance: it was trained without label dropout. Use another checkpoint"
        )


def _without_clip(request: DrawingRequest, config: CheckpointConfig) -> DrawingOptions:
    """Returns the options of `options_from` without CLIP guidance."""
    T = config.schedule.num_steps
    num_steps, permitted = request.num_steps or config.spec.default_steps, config.steps
    if num_steps > T:
        raise ScriptError(f"--num-steps {num_steps} is too large: this checkpoint has {T} timesteps")
    if permitted and num_steps not in permitted:
        raise ScriptError(
            f"this checkpoint does not permit --num-steps {num_steps}. Use {' or '.join(map(str, permitted))}"
        )
    sampler = request.sampler or config.samplers[0]
    if sampler not in config.samplers:
        raise ScriptError(f"this checkpoint does not permit --sampler {sampler}. Use {' or '.join(config.samplers)}")
    for option, value in (("--clip-prompt", request.clip_prompt), ("--clip-model", request.clip_model)):
        if value is not None and not request.clip_guidance_scale:
            raise ScriptError(
                f"{option} needs a --clip-guidance-scale above 0. The scale is 0, so CLIP guidance is off"
            )
    return DrawingOptions(sampler, num_steps, _guidance_from(request, config, sampler))


def _clip_from(request: DrawingRequest) -> ClipOptions:
    name = request.clip_model or EMBEDDED_NAME
    return ClipOptions(ClipGuidance(request.clip_guidance_scale), request.clip_prompt, name, load_clip(name).sha256)


def _guidance_from(request: DrawingRequest, config: CheckpointConfig, sampler: Sampler) -> Guidance:
    own, T = config.guidance_of(sampler), config.schedule.num_steps
    scale = own.scale if request.guidance_scale is None else request.guidance_scale
    start, stop = request.guidance_start or own.start, request.guidance_stop or own.stop
    if scale != 1 and not config.guidable:
        raise ScriptError(
            f"--guidance-scale {scale:g}: this checkpoint does not support guidance, because it was trained without "
            "label dropout. Use --guidance-scale 1"
        )
    if scale == 1 and (request.guidance_start or request.guidance_stop):
        raise ScriptError(
            "--guidance-start and --guidance-stop need a --guidance-scale above 1. The scale is 1, so guidance is off"
        )
    if start > stop or max(request.guidance_start or 1, request.guidance_stop or 1) > T:
        raise ScriptError(
            f"guidance from t = {start} to {stop}: --guidance-start must not be above --guidance-stop, "
            f"and both must be at most {T}"
        )
    return Guidance(scale, start, stop)
