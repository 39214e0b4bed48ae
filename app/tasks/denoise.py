"""Removes noise from a picture: the trajectories start from it at the timestep with the same noise level."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from app.engine.interface import ModelInfo
from app.engine.job import Input, Options, Search
from app.errors import FieldError
from app.tasks.fields import NOT_NULL, Number, NumStepsOfPath, SamplerName, may_be_absent
from app.tasks.from_image import PictureFields, job_of, kept, starting_at, task_of, unchanged
from app.tasks.labels import Label, LabelFields, label_field, label_of, missing_label
from app.tasks.preparation import Image, decode_for, noise_std_of, prepare, restored
from app.tasks.sampling import SamplingFields, options_of
from app.tasks.task import Task
from model.noisy_image import (
    DENOISING_SAMPLER,
    DENOISING_STEPS,
    NoisyComparison,
    can_compare,
    comparison_path,
    matching_timestep,
)
from model.paths import noise_above
from model.recognition import RECOGNITION_SEED
from model.spec import Sampler

if TYPE_CHECKING:
    from model.prepared_image import PreparedImage

DECIMALS = 4  # of a probability in an answer


class DenoiseFields(SamplingFields, LabelFields, PictureFields):
    """The fields of a request to remove noise from a picture."""

    label: Label = label_field(
        "The class of the picture: its name, or its number from 0. If absent, mode sample recognises it, and mode mean "
        "assumes no class."
    )
    noise_std: Annotated[Annotated[Number, Field(ge=0, le=1000)] | None, NOT_NULL] = Field(
        default=None,
        description="Standard deviation of the noise in grey levels of 0 to 255. If absent, it is estimated.",
        json_schema_extra=may_be_absent,
    )
    mode: Literal["mean", "sample"] = Field(
        default="sample",
        description="mean: the expected image in one network call, which has the highest PSNR but is blurred. sample: "
        "a sharp image by the reverse process.",
    )
    num_steps: NumStepsOfPath = Field(
        default=None,
        description="Number of steps from pure noise, 20 by default. An image takes only those below its noise "
        "level. With mode mean, only 1 is permitted.",
        json_schema_extra=may_be_absent,
    )
    sampler: SamplerName = Field(
        default=None,
        description="As in GenerateRequest, but ddim by default. With ddim all images of a request are equal, because "
        "it adds no noise.",
        json_schema_extra=may_be_absent,
    )


def read_noisy(checked: tuple[DenoiseFields, ModelInfo], data: bytes) -> tuple["PreparedImage", float]:
    """Converts a noisy picture to an image. Returns the image and its noise_std in grey levels. Raises PictureError."""
    fields, info = checked
    fit = "resize" if fields.fit == "auto" else fields.fit
    image = prepare(info, decode_for(info, data), fit, fields.invert)
    noise_std = noise_std_of(info, image) if fields.noise_std is None else fields.noise_std
    return image, round(noise_std, 3)  # the answer has the same value, so that a client can repeat the request


def denoise(info: ModelInfo, fields: DenoiseFields, image: "PreparedImage", noise_std: float) -> Task:
    """Returns the task that removes noise of the standard deviation `noise_std`, in grey levels.

    Raises FieldError for a value that the mode or the model does not support.
    """
    for field, value in (("num_steps", fields.num_steps), ("guidance_scale", fields.guidance_scale)):
        if fields.mode == "mean" and value not in (None, 1):
            raise FieldError(field, "Input should be 1 for mode 'mean'")
    label = label_of(info, fields)
    if label is None and not info.guidable:  # The network was trained without a null label.
        raise missing_label(info, f"Field required for model '{info.name}'")
    steps = fields.num_steps or min(DENOISING_STEPS, info.max_steps)
    defaults = {"num_steps": steps, "sampler": fields.sampler or _either(DENOISING_SAMPLER, info.samplers)}
    options = options_of(fields.model_copy(update=defaults), label, info)
    t = matching_timestep(info.schedule, noise_std)
    requested = 1 if fields.mode == "mean" else options.num_steps
    facts = {"noise_std": noise_std, "mode": fields.mode}
    task = partial(task_of, "denoise", info, fields, image, num_steps=requested, facts=facts)
    if not t:
        job = job_of(info, fields, unchanged(options), kept(image))
        return replace(task(job), result_facts=partial(_probabilities, None))
    if fields.mode == "mean":
        options = replace(options, num_steps=1, path=(t, 0), guidance_scale=1.0)
    else:
        options = starting_at(info, options, t)
    noisy = restored(image, noise_std)
    signal, _ = info.schedule.signal_and_noise(options.path[0])
    is_searched = label is None and fields.mode == "sample" and can_compare(info.schedule, t)
    comparison = NoisyComparison(info.num_classes, noise_std) if is_searched else None
    search = _search_in_noise(info, noisy, t, comparison) if comparison else None
    job = job_of(info, fields, options, Input(noisy, signal, 0.0), search)
    return replace(task(job), result_facts=partial(_probabilities, comparison))


def _search_in_noise(info: ModelInfo, image: Image, t: int, comparison: NoisyComparison) -> Search:
    """Returns the search for the class of a noisy image with the matching timestep t."""
    path = tuple(comparison_path(info.schedule, t))
    num_steps = 2 * (len(path) - 1)  # with the noise and with its negative at each timestep
    options = Options(None, RECOGNITION_SEED, num_steps, "noisy", 1.0, info.name, path)
    signal, noise = noise_above(info.schedule, *path[:2])
    start = Input(image, signal, noise, np.ones_like(image, dtype=np.bool_))
    return Search(options, comparison, start)


def _probabilities(comparison: NoisyComparison | None) -> dict[str, Any]:
    """Returns the probabilities of a finished comparison, or null without one, as a fact of the answer."""
    return {"probabilities": comparison and [round(each, DECIMALS) for each in comparison.probabilities]}


def _either(sampler: Sampler, permitted: Sequence[Sampler]) -> Sampler:
    """Returns the sampler if the model permits it, otherwise the one that the model recommends."""
    return sampler if sampler in permitted else permitted[0]
