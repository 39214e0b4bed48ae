"""The form of all tasks that the engine computes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from app.engine.interface import ModelInfo
from app.engine.job import JobRequest, Options
from model.png import ClipProvenance, Provenance


@dataclass(frozen=True, slots=True)
class Task:
    """What the engine computes for a request, and the parts of the answer that the task determines."""

    info: ModelInfo  # the model that computes it
    job: JobRequest  # a protocol adds its listener, and the numbers of previews and frames
    num_steps: int = 0  # the number of steps in the request; the path can have another number
    scale: int = 1
    facts: Mapping[str, Any] = field(default_factory=dict)  # the fields of the answer that only this task has
    result_facts: Callable[[], dict[str, Any]] = dict  # further facts, which are known when the job is finished
    chunks: Mapping[str, str] = field(default_factory=dict)  # further text chunks of the PNG files
    clip_sha256: str = ""  # digest of the weights of the model of CLIP guidance

    @property
    def options(self) -> Options:
        """The options that change pixels."""
        return self.job.options

    def class_facts(self, label: int | None) -> dict[str, Any]:
        """Returns the facts about the class of the finished job: its name, and the digit if the classes are digits."""
        return {"label": self.info.name_of(label), "digit": self.info.digit_of(label)}

    def provenance(self, label: int | None) -> Provenance:
        """Returns the provenance for the PNG files. `label` is the class of the finished job."""
        options, images, clip, name = self.options, self.job.images, None, self.info.name_of(label)
        if self.job.clip:
            clip = ClipProvenance(options.clip_guidance_scale, options.clip_prompt, self.clip_sha256)
        return Provenance(
            labels=() if name is None else (name,),
            seed=options.seed,
            sampler=options.sampler,
            num_steps=self.num_steps,
            guidance_scale=options.guidance_scale,
            model_sha256=self.info.sha256,
            task=self.chunks,
            first_index=images[0].index if images else 0,
            clip=clip,
            has_digits=self.info.has_digits,
        )
