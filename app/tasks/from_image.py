"""What the tasks with a picture have in common: the fields for its preparation, and the start of the trajectories."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, Field

from app.engine.interface import ModelInfo
from app.engine.job import Input, JobRequest, Options, Search
from app.errors import FieldError
from app.tasks.preparation import Image, Mask, decode_for, prepare
from app.tasks.sampling import ModelFields, SamplingFields
from app.tasks.task import Task
from model.paths import timesteps_from
from model.spec import Fit, Invert, ModelSpec, Sampler

if TYPE_CHECKING:
    from model.prepared_image import PreparedImage


class FittingFields(BaseModel):
    """The fields that control how pictures become images of the model."""

    fit: Fit = Field(
        default="auto",
        description="How the picture becomes an image of a model of handwriting, such as the shipped one. "
        "resize: the whole picture. digit: the drawing alone, as in MNIST (longest side 20 pixels, centred by mass). "
        "auto: unchanged if the picture has 28x28 pixels, otherwise digit (for /denoise and /inpaint, resize). With "
        "auto and resize, an image that was enlarged by an integer factor is first reduced to its original pixels. For "
        "every other model, the image is the central square of the picture.",
    )
    invert: Invert = Field(
        default="auto",
        description="true: the picture has dark strokes on a light background. false: light strokes on a dark "
        "background. auto: decided from the picture for a model of handwriting, otherwise false.",
    )


class PictureFields(ModelFields, FittingFields):
    """The fields of every request that prepares a picture for a model."""


def read_drawing(checked: tuple[FittingFields, ModelInfo], data: bytes) -> "PreparedImage":
    """Converts the picture of a drawing to an image, given the fields of its request and its model.

    Raises PictureError.
    """
    fields, info = checked
    return prepare(info, decode_for(info, data), fields.fit, fields.invert)


def check_model(info: ModelInfo, fields: FittingFields) -> None:
    """Raises FieldError if the model supports only generation, or does not support the value of `fit`."""
    if not has_picture_tasks(info):
        raise FieldError("model", f"The model '{info.name}' supports only /generate")
    check_fit(info, fields)


def check_fit(info: ModelInfo, fields: FittingFields) -> None:
    """Raises FieldError if the model does not support this way to prepare a picture."""
    if fields.fit == "digit" and not info.normalises_drawings:
        raise FieldError("fit", f"Input should be 'auto' or 'resize' for model '{info.name}'")


def has_picture_tasks(spec: ModelSpec) -> bool:
    """Returns True if the model supports the tasks with a picture.

    A model that permits only some numbers of steps was trained for their noise levels only.
    """
    return not spec.steps


def starting_at(info: ModelInfo, options: Options, t: int) -> Options:
    """Returns options whose path starts at t. The number of steps is multiplied by t / T."""
    sampler: Sampler = options.sampler  # type: ignore[assignment] # the options of a request have a sampler
    path = tuple(timesteps_from(info.schedule, sampler, options.num_steps, t))
    return replace(options, num_steps=len(path) - 1, path=path)


def with_noise(info: ModelInfo, image: Image, t: int, is_known: Mask | None = None) -> Input:
    """Returns the input of rows that start from the image with the noise of timestep t (Ho 2020, eq. 4)."""
    return Input(image, *info.schedule.signal_and_noise(t), is_known)


def unchanged(options: Options) -> Options:
    """Returns options for one step whose result is the image itself, if all of its pixels are known."""
    return replace(options, num_steps=1, path=(1, 0), guidance_scale=1.0)


def kept(image: "PreparedImage") -> Input:
    """Returns the input of rows whose pixels are all known."""
    pixels = image.x.numpy()
    return Input(pixels, 1.0, 0.0, np.ones_like(pixels, dtype=np.bool_))


def job_of(
    info: ModelInfo, fields: SamplingFields, options: Options, start: Input, search: Search | None = None
) -> JobRequest:
    """Returns the job that generates images from the start image, after the search if there is one."""
    return JobRequest(
        options,
        fields.count,
        timeout=fields.timeout_seconds,
        guided_steps=info.guided_steps_of(options, has_label=search is not None),
        input=start,
        search=search,
    )


def task_of(
    name: str,
    info: ModelInfo,
    fields: SamplingFields,
    image: "PreparedImage",
    job: JobRequest,
    *,
    num_steps: int,
    facts: Mapping[str, Any],
    chunks: Mapping[str, str] | None = None,
) -> Task:
    """Returns the task of a job that starts from an image. `num_steps` is that of the request."""
    return Task(
        info,
        job,
        num_steps=num_steps,
        scale=fields.scale,
        facts={**facts, **fitting_facts(image)},
        chunks={**chunks_of(name, image, facts), **(chunks or {})},
    )


def fitting_facts(image: "PreparedImage") -> dict[str, Any]:
    """Returns the facts about the preparation of a picture."""
    return {"fit": image.fit, "invert": image.inverted}


def chunks_of(name: str, image: "PreparedImage", facts: Mapping[str, Any]) -> dict[str, str]:
    """Returns the text chunks of a task with a picture."""
    digest = hashlib.sha256(image.pixels.numpy().tobytes()).hexdigest()
    named = {name.replace("_", "-").title(): str(value) for name, value in facts.items()}
    return {"Task": name, "Input-SHA256": digest, "Fit": image.fit, "Invert": str(image.inverted).lower(), **named}
