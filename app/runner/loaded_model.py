"""A model that is loaded on the device: its file, its step program and its description."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch

from app import VERSION
from app.engine.interface import ModelInfo
from app.engine.job import Options, StepSet
from model.checkpoint import Checkpoint
from model.clip_guidance import ClipGuidance
from model.pipelines.model import PipelineModel
from model.pipelines.step import PipelineStep
from model.recognition import Readout
from model.spec import PIPELINE_SAMPLERS, Guidance, Process, Sampler
from model.step import ReverseStep, Step

LoadedFile = Checkpoint | PipelineModel
CLIP_SCHEDULE_STEPS = 100  # T of the schedule for which the interval of CLIP guidance was chosen


class LoadedModel:
    """A model on the device. `step` runs one reverse step. It is `program`, or the compiled version of it."""

    def __init__(self, name: str, loaded: LoadedFile, device: torch.device, dtype: torch.dtype) -> None:
        self.loaded, self.info = loaded, _describe(name, loaded, device, dtype)
        self.program: ReverseStep | PipelineStep
        if isinstance(loaded, PipelineModel):
            self.program = loaded.step(device, dtype)
        else:
            self.program = ReverseStep(loaded, device, dtype)
        self.step: Step = self.program

    def use(self, step: Step, *, compiled: bool = True) -> None:
        """Uses this program for all further steps."""
        self.step, self.info = step, replace(self.info, compiled=compiled)


def _describe(name: str, loaded: LoadedFile, device: torch.device, dtype: torch.dtype) -> ModelInfo:
    spec = loaded.spec
    return ModelInfo(
        **vars(spec),
        name=name,
        sha256=loaded.sha256,
        num_parameters=sum(p.numel() for p in loaded.network.parameters()),
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        version=VERSION,
        compiled=False,
        guided_steps=_steps_of(loaded, loaded.guidance_of),
        clip_steps=_steps_of(loaded, lambda sampler: ClipGuidance(scale=1.0), CLIP_SCHEDULE_STEPS / spec.max_steps),
        readout=Readout.of(loaded.weights_sha256, spec.num_classes),
    )


def _steps_of(
    loaded: LoadedFile, guidance_of: Callable[[Sampler], Guidance | ClipGuidance], factor: float = 1.0
) -> Callable[[Options], StepSet]:
    """Returns a function that returns the steps in which the guidance of a sampler is applied.

    The interval of the guidance is compared with the timesteps multiplied by `factor`.
    """

    @lru_cache(maxsize=512)  # a set of 1,000 steps takes 60 kB
    def steps(process: Process, num_steps: int, path: tuple[int, ...]) -> StepSet:
        if process not in PIPELINE_SAMPLERS:
            return range(0)
        timesteps = loaded.timesteps(process, num_steps, path)
        return guidance_of(process).steps_within([round(t * factor) for t in timesteps])

    return lambda options: steps(options.sampler, options.num_steps, options.path)
