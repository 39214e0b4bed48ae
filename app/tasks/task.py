"""The form of all tasks that the engine computes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from app.engine.interface import ModelInfo
from app.engine.job import JobRequest, Options
from model.png import ClipProvenance, Provenance, rows_shape, sheet_shape


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
    one_each: bool = False  # True if the request names the class of each image

    @property
    def options(self) -> Options:
        """The options that change pixels."""
        return self.job.options

    def class_facts(self, label: int | None) -> dict[str, Any]:
        """Returns the name of the class of the finished job, and the digit if the classes are digits.

        Both are None if the images have different classes.
        """
        if self.one_each and len({image.label for image in self.job.images}) > 1:
            label = None
        return {"label": self.info.name_of(label), "digit": self.info.digit_of(label)}

    @property
    def label_names(self) -> list[str]:
        """The name of the class of each image, if the request names them."""
        return [self.info.class_names[image.label] for image in self.job.images] if self.one_each else []

    @property
    def sheet_shape(self) -> tuple[int, int]:
        """The numbers of rows and columns of a contact sheet of the images."""
        return (rows_shape if self.one_each else sheet_shape)(self.job.count)

    def provenance(self, label: int | None) -> Provenance:
        """Returns the provenance for the PNG files. `label` is the class of the finished job."""
        options, images, clip, name = self.options, self.job.images, None, self.info.name_of(label)
        if self.job.clip:
            clip = ClipProvenance(options.clip_guidance_scale, options.clip_prompt, self.clip_sha256)
        return Provenance(
            labels=tuple(self.label_names) or (() if name is None else (name,)),
            seed=options.seed,
            sampler=options.sampler,
            num_steps=self.num_steps,
            guidance_scale=options.guidance_scale,
            model_sha256=self.info.sha256,
            task=self.chunks,
            first_index=images[0].index if images else 0,
            clip=clip,
            has_digits=self.info.has_digits,
            one_each=self.one_each,
            noise=options.noise,
        )
