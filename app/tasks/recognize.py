"""Recognises the class of an image: each step compares the predictions of the classes with its pixels."""

from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from app.engine.interface import ModelInfo
from app.engine.job import Input, JobRequest, Options, Search
from app.errors import FieldError
from app.tasks.fields import WHOLE
from app.tasks.from_image import PictureFields, chunks_of, fitting_facts, with_noise
from app.tasks.task import Task
from model.recognition import DEFAULT_NUM_PAIRS, RECOGNITION_SEED, Recognition, ink_of, timesteps

if TYPE_CHECKING:
    from model.prepared_image import PreparedImage


class RecognizeFields(PictureFields):
    """The fields of a request to recognise a picture."""

    num_pairs: Annotated[
        int,
        Field(
            ge=1,
            le=100,
            description="Number of pairs of timestep and noise with which the classes are compared. More pairs are "
            "slower and more accurate. A class that is clearly worse than the best one is dropped early.",
        ),
        WHOLE,
    ] = DEFAULT_NUM_PAIRS


def recognize(info: ModelInfo, fields: RecognizeFields, image: "PreparedImage") -> Task:
    """Returns the task that recognises an image. Its result is a Recognition."""
    options, start, recognition = _recognition(info, image, fields.num_pairs)
    job = JobRequest(options, 1, timeout=fields.timeout_seconds, input=start, comparison=recognition)
    facts = {"num_pairs": fields.num_pairs}
    return Task(info, job, facts={**facts, **fitting_facts(image)}, chunks=chunks_of("recognize", image, facts))


def search_by_recognition(info: ModelInfo, image: "PreparedImage") -> Search:
    """Returns the search for the class of an image without noise, all of whose pixels are known."""
    options, start, recognition = _recognition(info, image, DEFAULT_NUM_PAIRS)
    return Search(options, recognition, start)


def _recognition(info: ModelInfo, image: "PreparedImage", num_pairs: int) -> tuple[Options, Input, Recognition]:
    """Returns the options and the input of a row that recognises an image, and the comparison of its classes.

    Raises FieldError for a model with one class.
    """
    if info.num_classes == 1:
        raise FieldError("model", f"The model '{info.name}' has one class, so there is nothing to recognise")
    path = (*timesteps(num_pairs, info.schedule.num_steps), 0)
    options = Options(None, RECOGNITION_SEED, num_pairs, "forward", 1.0, info.name, path)
    x_0 = image.x.numpy()
    start = with_noise(info, x_0, path[0], is_known=np.ones_like(x_0, dtype=np.bool_))
    (ink,) = ink_of(image.x[None])
    return options, start, Recognition(info.readout, ink, num_pairs, num_steps=info.schedule.num_steps)
