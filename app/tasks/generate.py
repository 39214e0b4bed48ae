"""Generates images of a class: the trajectories start from noise at T."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

from pydantic import Field

from app.engine.interface import ClipInfo, Embeddings, ModelInfo
from app.engine.job import ClipTarget, ImageKey, JobRequest, Options
from app.errors import FieldError
from app.tasks.fields import NOT_NULL, Number, Prompt, may_be_absent
from app.tasks.labels import Label, LabelFields, number_of, required_label_of
from app.tasks.sampling import SamplingFields, check_plan, options_of
from app.tasks.task import Task
from model.spec import MAX_CLIP_GUIDANCE_SCALE, Noise, Quality

# The facts about CLIP guidance of a task without it.
NO_CLIP: Mapping[str, Any] = {"clip_guidance_scale": 0.0, "clip_prompt": None, "clip": None, "warning": None}


class GenerateFields(SamplingFields, LabelFields):
    """The fields of a request for images of a class, or of a class for each image."""

    labels: Annotated[Annotated[list[Label], Field(min_length=1)] | None, NOT_NULL] = Field(
        default=None,
        description="The class of each image, instead of `label`, `digit` and `count`: image i has the class labels[i] "
        "and the pixels of image i of a request for that class with the same seed. A contact sheet then has one row, "
        "or rows of 16 images.",
        json_schema_extra=may_be_absent,
    )

    quality: Annotated[Quality | None, NOT_NULL] = Field(
        default=None,
        description="Chooses the sampler and the number of steps, from the fewest to the most evaluations of the "
        "network. `best` is the default of the model. GET /models lists them for each model. It cannot be combined "
        "with `sampler` or `num_steps`.",
        json_schema_extra=may_be_absent,
    )
    noise: Noise = Field(
        default="unfog",
        description="How noise is drawn. unfog: from the seed and the index of the image. torch: as diffusers draws it "
        'with `torch.Generator("cpu").manual_seed(seed + index)`, so that images can be compared. Only pipelines of '
        "diffusers support torch.",
    )
    clip_guidance_scale: Annotated[Number, Field(ge=0, le=MAX_CLIP_GUIDANCE_SCALE)] = Field(
        default=0,
        description="Scale of CLIP guidance: the distance by which a step moves the predicted image towards the "
        "prompt. 0 turns CLIP guidance off. Without a CLIP model, a value above 0 is answered with 501.",
    )
    clip_prompt: Annotated[Prompt | None, NOT_NULL] = Field(
        default=None,
        description='The prompt of CLIP guidance. The default for the digit 7 is "a handwritten digit seven", and for '
        'another class "a photo of a" and its name. A prompt is permitted only with a clip_guidance_scale above 0.',
        json_schema_extra=may_be_absent,
    )


def generate(info: ModelInfo, fields: GenerateFields, images: Sequence[ImageKey] = ()) -> Task:
    """Returns the task that generates images. `with_clip` adds its CLIP guidance, if it has any.

    `images` are those of JobRequest. Raises FieldError for a value that the model does not support, and for a prompt of
    CLIP guidance without a scale.
    """
    fields = _with_setting(info, fields)
    if fields.labels is not None:
        return _one_of_each(info, fields, [label for label in fields.labels if label is not None])
    label = required_label_of(info, fields)
    options = _with_clip_options(_options_of(info, fields, label), label, fields, info)
    return _task_of(info, fields, options, images)


def generate_each(info: ModelInfo, fields: SamplingFields, images: Sequence[ImageKey]) -> Task:
    """Returns the task that generates one image for each key. `fields` has the other options.

    Raises FieldError for a value that the model does not support.
    """
    return _task_of(info, fields, options_of(fields, images[0].label, info), images)


def _with_setting(info: ModelInfo, fields: GenerateFields) -> GenerateFields:
    """Returns the fields with the sampler and the steps of the quality. Raises FieldError if these are given too."""
    if fields.quality is None:
        return fields
    for name in ("sampler", "num_steps"):
        if name in fields.model_fields_set:
            raise FieldError(
                name, "This field cannot be combined with quality, which chooses the sampler and the steps"
            )
    sampler, num_steps = info.setting_of(fields.quality)
    return fields.model_copy(update={"sampler": sampler, "num_steps": num_steps})


def _one_of_each(info: ModelInfo, fields: GenerateFields, labels: Sequence[str | int]) -> Task:
    """Returns the task of a request with `labels`. Raises FieldError like `generate`."""
    for name in ("label", "digit", "count"):
        if name in fields.model_fields_set:
            raise FieldError(name, "This field cannot be combined with labels, which names the class of each image")
    if fields.clip_guidance_scale or fields.clip_prompt is not None:
        raise FieldError("labels", "CLIP guidance has one prompt for all images. Use label instead of labels")
    images = [ImageKey(number_of(info, label, "labels"), fields.seed, i) for i, label in enumerate(labels)]
    task = _task_of(info, fields, _options_of(info, fields, images[0].label), images)
    return replace(task, one_each=True)


def _options_of(info: ModelInfo, fields: GenerateFields, label: int) -> Options:
    """Returns the options without those of CLIP guidance. Raises FieldError like `generate`."""
    if fields.noise != "unfog" and not info.is_pipeline:
        raise FieldError(
            "noise", f"Input should be 'unfog' for model '{info.name}'. Only pipelines of diffusers support 'torch'"
        )
    return replace(options_of(fields, label, info), noise=fields.noise)


def _task_of(info: ModelInfo, fields: SamplingFields, options: Options, images: Sequence[ImageKey]) -> Task:
    check_plan(info, options)
    job = JobRequest(
        options,
        len(images) or fields.count,
        timeout=fields.timeout_seconds,
        guided_steps=info.guided_steps_of(options),
        images=tuple(images),
    )
    # Not in `facts`: the count is not checked yet, so the list could be of any length.
    labels = partial(_labels_of, info, job)
    return Task(
        info,
        job,
        num_steps=options.num_steps,
        scale=fields.scale,
        facts={**NO_CLIP, "noise": options.noise},
        result_facts=labels,
    )


def _labels_of(info: ModelInfo, job: JobRequest) -> dict[str, Any]:
    numbers: list[int | None] = [image.label for image in job.images] or [job.options.label] * job.count
    return {"labels": [info.name_of(number) for number in numbers]}


def with_clip(task: Task, clip: ClipInfo, text: Embeddings, evaluations: int, warning: str | None) -> Task:
    """Returns the task with its CLIP guidance.

    `text` is the embedding (E,) of its prompt. `evaluations` and `text` are those of ClipTarget. `warning` is a fact of
    the answer (see clip_warnings.py).
    """
    options = task.options
    target = ClipTarget(options.clip_guidance_scale, text, task.info.clip_steps(options), evaluations)
    facts = {
        "clip_guidance_scale": options.clip_guidance_scale,
        "clip_prompt": options.clip_prompt,
        "clip": {"name": clip.name, "sha256": clip.sha256},
        "warning": warning,
    }
    return replace(task, job=replace(task.job, clip=target), facts={**task.facts, **facts}, clip_sha256=clip.sha256)


def _with_clip_options(options: Options, label: int, fields: GenerateFields, info: ModelInfo) -> Options:
    """Returns the options with those of CLIP guidance. Raises FieldError for a prompt without a scale."""
    if not fields.clip_guidance_scale:
        if fields.clip_prompt is not None:
            raise FieldError("clip_prompt", "A prompt needs a clip_guidance_scale above 0")
        return options
    prompt = info.prompts[label] if fields.clip_prompt is None else fields.clip_prompt
    return replace(options, clip_guidance_scale=fields.clip_guidance_scale, clip_prompt=prompt)
