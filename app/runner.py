"""Computes one reverse step for a batch of rows, and keeps their state on the device."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from torch import Tensor

from app import VERSION
from app.config import Settings
from app.device import (
    DeviceLostError,
    OutOfMemoryError,
    RunnerError,
    check_compiler,
    choose_device,
    choose_dtype,
    choose_num_threads,
    device_errors,
)
from app.pace import Pace
from app.slots import Slots
from app.trajectory import Job, Options, Pixels, Trajectory
from model import checkpoint
from model.checkpoint import Checkpoint, CheckpointError
from model.noise import normal
from model.precision import CallRows
from model.prediction import predict_x_0
from model.sampler import Sampler, guide, make_plan, reverse_step

PROBE_TOLERANCE = 0.1  # mean absolute difference of pixels in [-1, 1]; bfloat16 makes 0.01, another digit 0.3
WARM_UP_BATCHES = (1, 2, 4, 8, 16, 32, 64)
WARM_UP_REPEATS = 3


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is served, in words and numbers."""

    name: str
    sha256: str
    num_parameters: int
    device: str
    dtype: str
    version: str
    num_classes: int
    max_steps: int
    samplers: tuple[Sampler, ...]
    guidance_scale: float  # the recommended one
    guidable: bool  # whether labels were dropped in training: without it guidance has nothing to lean on


class Runner:
    """Holds the network and, in slots, the state of every image that has begun.

    State, history and update are float32; only the network's input is cast. A step writes
    state after all else has succeeded, so it can be run again with other rows.
    """

    def __init__(self, loaded: Checkpoint, device: torch.device, dtype: torch.dtype, *, compiled: bool) -> None:
        self.device, self.dtype, self.image_shape = device, dtype, loaded.image_shape
        self.info = _describe(loaded, device, dtype)
        self._schedule, self._guidance = loaded.schedule, loaded.config.guidance
        self._probe, self._probe_image = loaded.config.probe, loaded.probe_image
        self._null_label = loaded.network.null_label
        self._mix = loaded.prediction.table(device)  # (T + 1, 3)
        self._condition = loaded.network.condition_table().to(device, dtype)  # (T + 1, num_classes + 1, D)
        self._plan_starts: dict[tuple[Sampler, int], int] = {}  # where each plan begins in the table
        self._plan_table = torch.empty(0, 5, device=device)  # a row a step: t and the coefficients a, b, c, s
        self._slots = Slots(loaded.image_shape, device)
        network = loaded.network.to(device, dtype)
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # not in the stubs
        self._rows = CallRows.of(device, dtype, compiled=compiled)
        self._denoise = torch.compile(network.denoise, dynamic=True) if compiled else network.denoise

    @classmethod
    def load(cls, settings: Settings) -> "Runner":
        """The runner that the settings ask for; RunnerError in one sentence where it cannot be had."""
        try:
            loaded = checkpoint.load(settings.checkpoint)
        except CheckpointError as error:
            raise RunnerError(f"UNFOG_CHECKPOINT: {error}") from error
        device = choose_device(settings.device)
        if settings.compile == "on":
            check_compiler()
        dtype = choose_dtype(settings.dtype, device)
        choose_num_threads(settings.num_threads, device, dtype)
        return cls(loaded, device, dtype, compiled=settings.compile == "on")

    @property
    def device_memory(self) -> Callable[[], int] | None:
        """Reads the bytes held on a GPU; None without one."""
        return partial(torch.cuda.memory_reserved, self.device) if self.device.type == "cuda" else None

    @torch.inference_mode()
    def step(self, trajectories: list[Trajectory]) -> list[bool]:
        """One reverse step for each row; True where its values are finite.

        OutOfMemoryError and DeviceLostError for what the device did; anything else is a bug.
        """
        with device_errors():
            self._begin([trajectory for trajectory in trajectories if trajectory.slot is None])
            slots = self._slots.of(trajectories)  # (B,)
            rows = self._slots.read(slots)
            plan = self._plan_table[rows.plan_row + rows.step]  # (B, 5)
            t = plan[:, 0].long()  # (B,)
            output = self._predict(rows.x_t, t, rows.y, rows.guidance_scale)  # (B, C, H, W)
            x_0 = predict_x_0(rows.x_t, output, self._mix[t])
            z = normal(rows.seed, rows.index, rows.step + 1, self.image_shape)
            x_prev = reverse_step(rows.x_t, x_0, rows.x_0, z, plan[:, 1:])
            finite: list[bool] = output.isfinite().flatten(1).all(dim=1).tolist()
            self._commit(slots, x_t=x_prev, x_0=x_0, step=rows.step + 1)
        return finite

    def _commit(self, slots: Tensor, **rows: Tensor) -> None:
        """Writes a step's results; state that was half written cannot be stepped again."""
        try:
            self._slots.write(slots, **rows)
        except Exception as error:
            raise DeviceLostError("a step was written in part") from error

    @torch.inference_mode()
    def pixels(self, trajectories: list[Trajectory]) -> list[Pixels]:
        """The images as they are predicted now, 8 bits; black where a trajectory has not begun."""
        with device_errors():
            begun = [trajectory for trajectory in trajectories if trajectory.slot is not None]
            x_0 = self._slots.state.x_0[self._slots.of(begun)]  # (B, C, H, W)
            x_0 = torch.cat([x_0, torch.full_like(self._slots.state.x_0[:1], -1)])  # the last one is black
            levels = ((x_0 + 1) * 127.5).round().to(torch.uint8)
            layout = "b 1 h w -> b h w" if self.image_shape[0] == 1 else "b c h w -> b h w c"
            images = rearrange(levels, layout).cpu().numpy()
        place = {trajectory: i for i, trajectory in enumerate(begun)}
        return [images[place.get(trajectory, -1)] for trajectory in trajectories]

    def release(self, trajectories: list[Trajectory]) -> None:
        """Gives back the slots of those that have one."""
        self._slots.release(trajectories)

    def warm_up(self, should_stop: Callable[[], bool]) -> Pace:
        """Draws the probe and compares it, then times steps; RunnerError if the picture is not the known one."""
        self._check_probe()
        seconds: dict[int, float] = {}
        for rows in WARM_UP_BATCHES:
            if should_stop():
                break
            try:
                seconds[rows] = self._time_step(Job(Options(0, 0, self.info.max_steps, "ddpm", 1.0), rows).unfinished)
            except OutOfMemoryError:
                break
        return Pace(seconds or {1: 1.0})

    def _check_probe(self) -> None:
        probe = self._probe
        options = Options(probe.digit, probe.seed, probe.num_steps, probe.sampler, self._guidance.scale)
        trajectory = Job(options, 1).unfinished[0]
        for _ in range(probe.num_steps):
            self.step([trajectory])
        drawn = self._slots.state.x_0[trajectory.slot].cpu()
        self.release([trajectory])
        difference = (drawn - self._probe_image).abs().mean().item()
        if not difference <= PROBE_TOLERANCE:
            raise RunnerError(f"this machine draws the checkpoint's known picture wrong, by {difference:.2f} a pixel")

    def _time_step(self, trajectories: list[Trajectory]) -> float:
        durations = []
        try:
            for _ in range(min(WARM_UP_REPEATS, self.info.max_steps)):
                start = time.perf_counter()
                self.step(trajectories)
                durations.append(time.perf_counter() - start)
        finally:
            self.release(trajectories)
        return min(durations)

    def _begin(self, trajectories: list[Trajectory]) -> None:
        """Gives each a slot with x_T in it."""
        if not trajectories:
            return
        options = [trajectory.job.options for trajectory in trajectories]
        seed, y, plan_row = torch.tensor(
            [[o.seed, o.digit, self._plan_row(o.sampler, o.num_steps)] for o in options], device=self.device
        ).unbind(dim=1)  # (B,) each
        index = torch.tensor([trajectory.index for trajectory in trajectories], device=self.device)  # (B,)
        step = torch.zeros_like(seed)
        x_T = normal(seed, index, step, self.image_shape)  # (B, C, H, W)
        scale = torch.tensor([o.guidance_scale for o in options], device=self.device)  # (B,)
        self._slots.begin(
            trajectories,
            x_t=x_T,
            x_0=torch.zeros_like(x_T),
            seed=seed,
            index=index,
            y=y,
            plan_row=plan_row,
            step=step,
            guidance_scale=scale,
        )

    def _predict(self, x_t: Tensor, t: Tensor, y: Tensor, guidance_scale: Tensor) -> Tensor:
        """Rows whose guidance acts at their step are evaluated a second time, without label, in the same call."""
        acts = (guidance_scale != 1) & (t >= self._guidance.start) & (t <= self._guidance.stop)
        guided = acts.nonzero()[:, 0]  # (G,)
        null = torch.full_like(guided, self._null_label)
        output = self._call(torch.cat([x_t, x_t[guided]]), torch.cat([t, t[guided]]), torch.cat([y, null]))
        cond, uncond = output.split([len(x_t), len(guided)])
        scale = guidance_scale[guided][:, None, None, None]  # (G, 1, 1, 1)
        return cond.index_copy(0, guided, guide(cond[guided], uncond, scale))

    def _call(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """(N, C, H, W), (N,), (N,) -> (N, C, H, W) float32, in as few calls of the network as may be."""

        def denoise(x: Tensor, c: Tensor) -> Tensor:
            return self._denoise(x.contiguous(memory_format=torch.channels_last), c)

        return self._rows.call(denoise, x_t.to(self.dtype), self._condition[t, y]).float()

    def _plan_row(self, sampler: Sampler, num_steps: int) -> int:
        """Where in the table this plan starts; it is made the first time that it is asked for."""
        key = (sampler, num_steps)
        if key not in self._plan_starts:
            plan = make_plan(self._schedule, sampler, num_steps)
            t = torch.tensor(plan.timesteps[:-1])[:, None]  # (num_steps, 1)
            self._plan_starts[key] = len(self._plan_table)
            rows = torch.cat([t, plan.coefficients], dim=1).to(self.device)  # (num_steps, 5)
            self._plan_table = torch.cat([self._plan_table, rows])
        return self._plan_starts[key]


def _describe(loaded: Checkpoint, device: torch.device, dtype: torch.dtype) -> ModelInfo:
    config = loaded.config
    return ModelInfo(
        name="default",
        sha256=loaded.sha256,
        num_parameters=sum(p.numel() for p in loaded.network.parameters()),
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        version=VERSION,
        num_classes=config.unet.num_classes,
        max_steps=config.schedule.num_steps,
        samplers=config.samplers,
        guidance_scale=config.guidance.scale,
        guidable=config.guidable,
    )
