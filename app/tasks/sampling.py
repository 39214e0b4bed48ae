"""The options that the tasks share: their fields with limits and defaults, and what a model permits of them."""

import random
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from app.engine.interface import ModelInfo
from app.engine.job import FAST_MODEL, Options
from app.errors import FieldError
from app.tasks.fields import NOT_NULL, WHOLE, GuidanceScale, NumSteps, SamplerName, Seconds, may_be_absent
from app.tasks.names import either
from model.png import MAX_SCALE, MAX_SEED
from model.spec import Sampler

LARGEST_SIDE = 512  # pixels of a side of an enlarged image; a contact sheet of 64 images has 8 times as many


def new_seed() -> int:
    """Returns a random seed for a request without one."""
    return random.randrange(MAX_SEED + 1)


class TimedFields(BaseModel):
    """The field of every request that takes time. All fields have strict types, and no other fields are permitted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    timeout_seconds: Seconds = Field(
        default=None,
        description="Deadline in seconds. A request that is not finished by then is answered with 504. The default "
        "is 30 s in `/score` and depends on the size of all other requests. If the operator sets "
        "UNFOG_REQUEST_TIMEOUT, this is the default and the maximum.",
        json_schema_extra=may_be_absent,
    )


class ModelFields(TimedFields):
    """The fields of every request that names its model."""

    model: Annotated[Annotated[str, Field(max_length=128)] | None, NOT_NULL] = Field(
        default=None,
        description="The model to use. GET /models lists all, and the first one is the default. The shipped "
        f"`{FAST_MODEL}` supports only /generate with num_steps 4, sampler ddim and guidance_scale 1, and answers "
        "other values with 422.",
        json_schema_extra=may_be_absent,
    )


def num_steps_field() -> Any:
    """Returns the definition of the field `num_steps`, of which tasks permit different values."""
    return Field(
        default=None,
        description="Number of denoising steps. If absent, the default of the model (shipped checkpoints: 100 for "
        "`default`, 4 for `fast`).",
        json_schema_extra=may_be_absent,
    )


class SamplingFields(ModelFields):
    """The fields of every request for images."""

    count: Annotated[int, Field(ge=1, description="Number of images, at most UNFOG_MAX_COUNT."), WHOLE] = 1
    seed: Annotated[
        int, Field(ge=0, le=MAX_SEED, description="Random seed. If absent, the server chooses and returns one."), WHOLE
    ] = Field(default_factory=new_seed)
    num_steps: NumSteps = num_steps_field()
    sampler: SamplerName = Field(
        default=None,
        description="ddpm: ancestral sampling with the posterior variance. ddim: deterministic. dpmpp: "
        "DPM-Solver++(2M). euler: Euler's method, for pipelines of diffusers only. If absent, the default of the model "
        "(shipped checkpoints: ddpm for `default`, ddim for `fast`).",
        json_schema_extra=may_be_absent,
    )
    guidance_scale: GuidanceScale = Field(
        default=None,
        description="Scale of classifier-free guidance, 1 = off. If absent, the recommendation of the checkpoint for "
        "the sampler.",
        json_schema_extra=may_be_absent,
    )
    scale: Annotated[
        int,
        Field(ge=1, le=MAX_SCALE, description="Enlargement factor: each pixel becomes scale x scale pixels."),
        WHOLE,
    ] = 1


def max_scale_of(side: int) -> int:
    """Returns the largest `scale` of images with this number of pixels per side."""
    return min(MAX_SCALE, max(1, LARGEST_SIDE // side))


def options_of(fields: SamplingFields, label: int | None, info: ModelInfo) -> Options:
    """Returns the options of a request for images of a class, with the defaults of its model.

    Raises FieldError for a value that the model does not support. The path of the options is empty.
    """
    if fields.scale > (most := max_scale_of(max(info.image_shape[1:]))):
        raise _unsupported("scale", f"less than or equal to {most}", info)
    sampler = fields.sampler or info.samplers[0]
    if sampler not in info.samplers:
        raise _unsupported("sampler", either(info.samplers), info)
    options = Options(
        label=label,
        seed=fields.seed,
        num_steps=fields.num_steps or info.default_steps,
        sampler=sampler,
        guidance_scale=fields.guidance_scale or info.guidance_scale[sampler],
        model=info.name,
    )
    if options.num_steps > info.max_steps:
        raise _unsupported("num_steps", f"less than or equal to {info.max_steps}", info)
    if info.steps and options.num_steps not in info.steps:
        raise _unsupported("num_steps", " or ".join(map(str, info.steps)), info)
    if options.guidance_scale != 1 and not info.guidable:
        raise _unsupported("guidance_scale", "1 (no guidance)", info)
    return options


def check_plan(info: ModelInfo, options: Options) -> None:
    """Raises FieldError if the sampler of a pipeline has no plan for the number of steps."""
    sampler: Sampler = options.sampler  # type: ignore[assignment] # the options of a request have a sampler
    if not info.has_plan(sampler, options.num_steps):
        fewer = info.nearest_steps(sampler, options.num_steps)
        message = f"The sampler {sampler} of model '{info.name}' has no plan for {options.num_steps} steps"
        raise FieldError("num_steps", f"{message}. Use {fewer}, for example")


def _unsupported(field: str, supported: str, info: ModelInfo) -> FieldError:
    return FieldError(field, f"Input should be {supported} for model '{info.name}'")
