"""Draws digits with a checkpoint, many at once, in the arithmetic that serves them."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model import checkpoint
from model.checkpoint import Checkpoint
from model.precision import CallRows, can_compile, fast_dtype, no_compiler
from model.sampler import Guidance, Sampler, sample, timesteps_of
from model.schedule import Schedule
from scripts.progress import Reporter

OnStep = Callable[[int, Tensor, Tensor], None]  # (t, x_t, x_0)


class DrawingError(Exception):
    """These options cannot be drawn with; one sentence."""


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


class Drawer:
    """A checkpoint on its way to pictures.

    The network computes in the precision that the hardware multiplies fast; what depends on t and y
    alone is a table made in float32; the state stays float32. Compiling takes a minute and pays for
    thousands of images; their last bits are others then.
    """

    def __init__(self, loaded: Checkpoint, device: torch.device | None = None, *, compiled: bool = False) -> None:
        self.checkpoint, self.compiled = loaded, compiled
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = fast_dtype(self.device)
        self._rows = CallRows.of(self.device, self.dtype, compiled=compiled)
        self._condition = loaded.network.condition_table().to(self.device, self.dtype)  # (T + 1, num_classes + 1, D)
        network = loaded.network.to(self.device, self.dtype)
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # not in the stubs
        self._denoise = torch.compile(network.denoise) if compiled else network.denoise

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the checkpoint can draw."""
        return self.checkpoint.config.class_names

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the images beside options and seed, as JSON keeps it."""
        return {
            "weights_sha256": self.checkpoint.weights_sha256,
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "compiled": self.compiled,
        }

    def denoise(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x_t (B, C, H, W), t (B,), y (B,) -> what the network predicts (B, C, H, W), float32."""

        def denoise(x: Tensor, c: Tensor) -> Tensor:
            return self._denoise(x.contiguous(memory_format=torch.channels_last), c)

        return self._rows.call(denoise, x_t.to(self.dtype), self._condition[t, y]).float()

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
        """Labels y and indices (N,) -> images (N, C, H, W) in [-1, 1] on the CPU, the same for the same seed.

        `timesteps`, falling to 0, stand in for those that num_steps gives; `on_step(t, x_t, x_0)` is called
        for each batch at each step.
        """
        x_0 = []
        with reporter.task(f"drawing {len(y)} images", len(y) * options.num_steps, "steps") as task:

            def step(t: int, x_t: Tensor, predicted_x_0: Tensor) -> None:
                task.advance(len(x_t))
                if on_step:
                    on_step(t, x_t, predicted_x_0)

            for rows in torch.arange(len(y)).split(batch_size):
                x_0.append(self._draw_batch(y[rows], index[rows], options, seed, timesteps, step))
        return torch.cat(x_0)

    def _draw_batch(
        self,
        y: Tensor,
        index: Tensor,
        options: DrawingOptions,
        seed: int,
        timesteps: list[int] | None,
        on_step: OnStep,
    ) -> Tensor:
        y = y.to(self.device)
        x_0 = sample(
            self.denoise,
            self.checkpoint.schedule,
            y,
            seed=torch.full_like(y, seed),
            index=index.to(self.device),
            image_shape=self.checkpoint.image_shape,
            sampler=options.sampler,
            num_steps=options.num_steps,
            timesteps=timesteps,
            guidance=options.guidance,
            prediction=self.checkpoint.prediction,
            null_label=self.checkpoint.network.null_label,
            on_step=on_step,
        )
        return x_0.cpu()


def open_drawer(args: argparse.Namespace) -> Drawer:
    """The drawer of --checkpoint; CheckpointError, or DrawingError where --compile finds no compiler."""
    if args.compile and not can_compile():
        raise DrawingError(f"--compile {no_compiler()}")
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    return Drawer(checkpoint.load(args.checkpoint), compiled=args.compile)


def options_from(args: argparse.Namespace, loaded: Checkpoint) -> DrawingOptions:
    """What the arguments ask for, the checkpoint's own where they do not; DrawingError for what it cannot do."""
    T = loaded.schedule.num_steps
    num_steps, permitted = args.num_steps or loaded.config.recommended_steps, loaded.config.steps
    if num_steps > T:
        raise DrawingError(f"--num-steps {num_steps} is too many: this checkpoint has {T} steps")
    if permitted and num_steps not in permitted:
        raise DrawingError(f"this checkpoint draws in {' or '.join(map(str, permitted))} steps, not in {num_steps}")
    sampler = args.sampler or loaded.config.samplers[0]
    if sampler not in loaded.config.samplers:
        raise DrawingError(f"this checkpoint does not permit --sampler {sampler}")
    return DrawingOptions(sampler, num_steps, _guidance_from(args, loaded, sampler))


def _guidance_from(args: argparse.Namespace, loaded: Checkpoint, sampler: Sampler) -> Guidance:
    own, T = loaded.config.guidance_of(sampler), loaded.schedule.num_steps
    scale = own.scale if args.guidance_scale is None else args.guidance_scale
    start, stop = args.guidance_start or own.start, args.guidance_stop or own.stop
    if scale != 1 and not loaded.config.guidable:
        raise DrawingError(
            "this checkpoint cannot be guided: no label was dropped in its training, so --guidance-scale must be 1"
        )
    if scale == 1 and (args.guidance_start or args.guidance_stop):
        raise DrawingError("guidance is off: give a --guidance-scale above 1, or neither --guidance-start nor -stop")
    if start > stop or max(args.guidance_start or 1, args.guidance_stop or 1) > T:
        raise DrawingError(f"--guidance-start must not lie above --guidance-stop, nor either of them above {T}")
    return Guidance(scale, start, stop)
