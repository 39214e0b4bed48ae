"""A model that is loaded on the device: its checkpoint, its step program and its description."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch

from app import VERSION
from app.engine.interface import ModelInfo
from app.engine.job import Options, StepSet
from model.checkpoint import Checkpoint
from model.clip_guidance import ClipGuidance
from model.paths import timesteps_along, timesteps_of
from model.recognition import Readout
from model.spec import SAMPLERS, Guidance, ModelSpec, Process, Sampler
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
    spec = loaded.config.spec
    return ModelInfo(
        **vars(spec),
        name=name,
        sha256=loaded.sha256,
        num_parameters=sum(p.numel() for p in loaded.network.parameters()),
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        version=VERSION,
        compiled=False,
        guided_steps=_steps_of(spec, loaded.config.guidance_of),
        clip_steps=_steps_of(spec, lambda sampler: ClipGuidance(scale=1.0)),
        readout=Readout.of(loaded.weights_sha256, spec.num_classes),
    )


def _steps_of(
    spec: ModelSpec, guidance_of: Callable[[Sampler], Guidance | ClipGuidance]
) -> Callable[[Options], StepSet]:
    """Returns a function that returns the steps in which the guidance of a sampler is applied."""

    @lru_cache(maxsize=4096)
    def steps(process: Process, num_steps: int, path: tuple[int, ...]) -> StepSet:
        if process not in SAMPLERS:
            return range(0)
        timesteps = timesteps_along(path) if path else timesteps_of(spec.schedule, process, num_steps)
        return guidance_of(process).steps_within(timesteps[:-1])

    return lambda options: steps(options.sampler, options.num_steps, options.path)
