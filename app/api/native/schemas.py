"""The parts that several answers have in common. Their docstrings and descriptions appear in the OpenAPI document."""

import time
from typing import Annotated

from pydantic import BaseModel, Field

from app.engine.job import Timings
from app.tasks.fields import AppliedFit
from model.spec import Noise, Sampler


class ModelName(BaseModel):
    """A model, and the digest of its file or of its weights."""

    name: str
    sha256: str


class GeneratedImage(BaseModel):
    """One image as a PNG file in base64."""

    index: int
    png: str


class Timing(BaseModel):
    """Seconds that the request waited in the queue, that its denoising took, and that it took in total."""

    queue_seconds: float
    denoise_seconds: float
    total_seconds: float

    @classmethod
    def of(cls, timings: Timings) -> "Timing":
        """Returns the times of a finished job. The total time ends with this call."""
        queue, denoise, total = seconds_of(timings)
        return cls(queue_seconds=queue, denoise_seconds=denoise, total_seconds=total)


def seconds_of(timings: Timings) -> tuple[float, float, float]:
    """Returns the seconds that a finished request waited in the queue, that its work took, and its age, rounded."""
    queue, work = timings.phases
    return round(queue, 6), round(work, 6), round(time.monotonic() - timings.submitted_at, 6)


Evaluations = Annotated[
    int,
    Field(description="Number of network evaluations of each image, without the search for its class."),
]


class ImagesResponse(BaseModel):
    """The images, and the options that were used."""

    label: str | None = Field(description="The name of the class of the images, or null if no class was assumed.")
    digit: int | None = Field(
        description="The digit of the images, or null if no class was assumed or if the classes are not digits."
    )
    count: int
    seed: int
    num_steps: int
    sampler: Sampler
    guidance_scale: float
    model: ModelName
    evaluations: Evaluations
    images: list[GeneratedImage]
    timing: Timing


class GenerateResponse(ImagesResponse):
    """The images, and all values that are needed to reproduce them."""

    label: str | None = Field(
        description="The name of the class of the images, or null if the images have different ones."
    )
    labels: list[str] = Field(description="The name of the class of each image.")
    noise: Noise = Field(description="How noise was drawn, as in the request.")
    clip_guidance_scale: float
    clip_prompt: str | None = Field(description="The prompt of CLIP guidance, or null without CLIP guidance.")
    clip: ModelName | None = Field(description="The model of CLIP guidance, or null without CLIP guidance.")
    warning: str | None = Field(
        description="Why the prompt of CLIP guidance probably does not have the expected effect, or null."
    )


class PictureFacts(BaseModel):
    """How the picture was changed before it was used."""

    fit: AppliedFit
    invert: bool
