"""A model that is loaded on the device: its checkpoint, its step program and its description."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch

from app import VERSION
from app.engine.interface import ModelInfo
from model.checkpoint import Checkpoint
from model.sampler import Sampler, timesteps_of
from model.step import ReverseStep, Step


class LoadedModel:
    """A checkpoint on the device. `step` runs one reverse step. It is `program`, or the compiled version of it."""

    def __init__(self, name: str, loaded: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.checkpoint, self.info = loaded, _describe(name, loaded, device, dtype)
        self.program = ReverseStep(loaded, device, dtype)
        self.step: Step = self.program

    def use(self, compiled: Step) -> None:
        """Uses the compiled program for all further steps."""
        self.step, self.info = compiled, replace(self.info, compiled=True)


def _describe(name: str, loaded: Checkpoint, device: torch.device, dtype: torch.dtype) -> ModelInfo:
    config = loaded.config
    return ModelInfo(
        name=name,
        sha256=loaded.sha256,
        num_parameters=sum(p.numel() for p in loaded.network.parameters()),
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        version=VERSION,
        compiled=False,
        num_classes=config.unet.num_classes,
        max_steps=config.schedule.num_steps,
        steps=config.steps,
        default_steps=config.recommended_steps,
        samplers=config.samplers,
        guidance_scale={sampler: config.guidance_of(sampler).scale for sampler in config.samplers},
        guided_steps=_guided_steps(loaded),
        guidable=config.guidable,
    )


def _guided_steps(loaded: Checkpoint) -> Callable[[Sampler, int], range]:
    @cache
    def guided_steps(sampler: Sampler, num_steps: int) -> range:
        timesteps = timesteps_of(loaded.schedule, sampler, num_steps)
        return loaded.config.guidance_of(sampler).interval_of(timesteps[:-1])

    return guided_steps
