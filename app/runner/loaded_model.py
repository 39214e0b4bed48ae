"""One checkpoint's network on its device, and what is to be known of it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch

from app import VERSION
from app.engine.job import Options
from model.checkpoint import Checkpoint
from model.sampler import Sampler, timesteps_of
from model.step import ReverseStep, Step


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is served under a name, in words and numbers."""

    name: str
    sha256: str
    num_parameters: int
    device: str
    dtype: str
    version: str
    compiled: bool
    num_classes: int
    max_steps: int
    steps: tuple[int, ...]  # the only numbers of steps that it draws in; () = all of 1..max_steps
    default_steps: int  # the recommended number
    samplers: tuple[Sampler, ...]  # the recommended one first
    guidance_scale: dict[Sampler, float]  # the recommended one of each
    guided_steps: Callable[[Sampler, int], range]  # (sampler, num_steps) -> the steps in which guidance acts
    guidable: bool  # whether labels were dropped in training: without it guidance has nothing to lean on

    def guided_steps_of(self, options: Options) -> range:
        """The steps of these images that take a second evaluation."""
        guided = options.guidance_scale != 1
        return self.guided_steps(options.sampler, options.num_steps) if guided else range(0)


class Network:
    """The network on its device, and the reverse step that it makes: as it is, until a compiled one takes its place."""

    def __init__(self, name: str, loaded: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.checkpoint, self.info = loaded, _describe(name, loaded, device, dtype)
        self.program = ReverseStep(loaded, device, dtype)
        self.step: Step = self.program

    def use(self, compiled: Step) -> None:
        """From now on steps are made by this."""
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
