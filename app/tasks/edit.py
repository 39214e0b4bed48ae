"""Redraws a sketch: the trajectories start from it, with noise, at a timestep below T."""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from app.engine.interface import ModelInfo
from app.tasks.fields import Number, NumStepsOfPath
from app.tasks.from_image import PictureFields, job_of, kept, starting_at, task_of, unchanged, with_noise
from app.tasks.labels import Label, LabelFields, label_field, label_of
from app.tasks.recognize import search_by_recognition
from app.tasks.sampling import SamplingFields, num_steps_field, options_of
from app.tasks.task import Task
from model.editing import start_timestep

if TYPE_CHECKING:
    from model.prepared_image import PreparedImage


class EditFields(SamplingFields, LabelFields, PictureFields):
    """The fields of a request to redraw a sketch."""

    label: Label = label_field(
        "The class to generate: its name, or its number from 0. If absent, the class that is recognised in the sketch."
    )
    num_steps: NumStepsOfPath = num_steps_field()
    strength: Annotated[
        Number,
        Field(
            ge=0,
            le=1,
            description="How much the result may differ from the sketch. 0 returns the sketch, 1 ignores it. It is a "
            "share of the range of log-SNR, so it has the same meaning for every noise schedule.",
        ),
    ] = 0.6


def edit(info: ModelInfo, fields: EditFields, image: "PreparedImage") -> Task:
    """Returns the task that redraws a sketch. Raises FieldError for a value that the model does not support."""
    label = label_of(info, fields)
    options = options_of(fields, label, info)
    t = start_timestep(info.schedule, fields.strength)
    facts = {"strength": fields.strength}
    task = partial(task_of, "edit", info, fields, image, num_steps=options.num_steps, facts=facts)
    if not t:
        return task(job_of(info, fields, unchanged(options), kept(image)))
    options = starting_at(info, options, t)
    start = with_noise(info, image.x.numpy(), options.path[0])
    if fields.strength == 1:
        start = replace(start, signal=0.0, noise=1.0)  # At T, a little of the sketch is left in x_t.
    search = search_by_recognition(info, image) if label is None else None
    return task(job_of(info, fields, options, start, search))
