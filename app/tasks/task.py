"""The task of a request: what the engine computes, and the facts of the answer. All tasks have this form."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from app.engine.job import JobRequest, Options
from model.png import ClipProvenance, Provenance


@dataclass(frozen=True, slots=True)
class Task:
    """What the engine computes for a request, and the parts of the answer that the task determines."""

    job: JobRequest  # a protocol adds what it wants to hear about the progress
    num_steps: int = 0  # the number of steps in the request; the path can have another number
    scale: int = 1
    facts: Mapping[str, Any] = field(default_factory=dict)  # the fields of the answer that only this task has
    result_facts: Callable[[], dict[str, Any]] = dict  # further ones, when the job is finished
    chunks: Mapping[str, str] = field(default_factory=dict)  # further text chunks of the PNG files
    clip_sha256: str = ""  # digest of the weights of the model of CLIP guidance

    @property
    def options(self) -> Options:
        """The options that change pixels."""
        return self.job.options

    def provenance(self, model_sha256: str, digit: int | None) -> Provenance:
        """Returns the provenance for the PNG files. `digit` is the class of the finished job."""
        options, images, clip = self.options, self.job.images, None
        if self.job.clip:
            clip = ClipProvenance(options.clip_guidance_scale, options.clip_prompt, self.clip_sha256)
        return Provenance(
            digit="none" if digit is None else digit,
            seed=options.seed,
            sampler=options.sampler,
            num_steps=self.num_steps,
            guidance_scale=options.guidance_scale,
            model_sha256=model_sha256,
            task=self.chunks,
            first_index=images[0].index if images else 0,
            clip=clip,
        )
