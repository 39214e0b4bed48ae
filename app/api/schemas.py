"""The schemas of JSON requests and responses. Their docstrings and descriptions appear in the OpenAPI document."""

import random
import time
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic.config import JsonDict

from app.engine.job import DEFAULT_MODEL, FAST_MODEL, Timings
from model.clip import MAX_PROMPT_LENGTH, is_prompt
from model.clip_guidance import MAX_CLIP_GUIDANCE_SCALE
from model.png import MAX_SCALE, MAX_SEED
from model.sampler import MAX_GUIDANCE_SCALE, Sampler


def _whole(value: Any) -> Any:
    """Converts 7.0 to 7, because both are integers in JSON Schema (validation draft 2020-12, section 6.1.1)."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _refuse_null(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """Rejects null with the error for a value of the wrong type. The field can be omitted, but not be null."""
    return handler(object() if value is None else value)


def may_be_absent(schema: dict[str, Any]) -> None:
    """Edits the JSON schema of a field that can be omitted, but not be null."""
    schema.pop("default")
    schema.update(schema.pop("anyOf")[0])


WHOLE = BeforeValidator(_whole)  # Use WHOLE after the bounds. Otherwise the JSON schema lacks them.
NOT_NULL = WrapValidator(_refuse_null)
Number = Annotated[float, Field(allow_inf_nan=False)]
Base64 = Annotated[str, Field(json_schema_extra={"contentEncoding": "base64"})]  # the type of a picture
SamplerName = Annotated[Sampler | None, NOT_NULL]
GuidanceScale = Annotated[Annotated[Number, Field(ge=1, le=MAX_GUIDANCE_SCALE)] | None, NOT_NULL]
NumSteps = Annotated[Annotated[int, Field(ge=1, le=100), WHOLE] | None, NOT_NULL]


def _check_prompt(text: str) -> str:
    if not is_prompt(text):
        raise ValueError("Input should have a character that is not white space")
    return text


# Matches a character that str.strip() keeps. \s of JSON Schema does not match the control characters in the brackets.
NOT_BLANK = r"[^\s\x1c-\x1f\x85]"
Prompt = Annotated[  # a text for CLIP
    str,
    Field(min_length=1, max_length=MAX_PROMPT_LENGTH, json_schema_extra={"pattern": NOT_BLANK}),
    AfterValidator(_check_prompt),
]


def new_seed() -> int:
    """Returns a random seed for a request without one."""
    return random.randrange(MAX_SEED + 1)


class TimedRequest(BaseModel):
    """The field of every request that the engine computes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    timeout_seconds: Annotated[Annotated[Number, Field(gt=0)] | None, NOT_NULL] = Field(
        default=None,
        description="Deadline in seconds. A request that is not finished by then is answered with 504. The default "
        "is 30 s in `/score` and depends on the size of all other requests. If the operator sets "
        "UNFOG_REQUEST_TIMEOUT, this is the default and the maximum.",
        json_schema_extra=may_be_absent,
    )


class BaseRequest(TimedRequest):
    """The fields of every request that names its model."""

    model: str = Field(
        default=DEFAULT_MODEL,
        max_length=128,
        description=f"The checkpoint to use: `{DEFAULT_MODEL}` or `{FAST_MODEL}`. The shipped `{FAST_MODEL}` supports "
        "only /generate with num_steps 4, sampler ddim and guidance_scale 1, and answers other values with 422.",
    )


class SamplingRequest(BaseRequest):
    """The fields of every request for images."""

    count: Annotated[int, Field(ge=1, description="Number of images, at most UNFOG_MAX_COUNT."), WHOLE] = 1
    seed: Annotated[
        int, Field(ge=0, le=MAX_SEED, description="Random seed. If absent, the server chooses and returns one."), WHOLE
    ] = Field(default_factory=new_seed)
    num_steps: NumSteps = Field(
        default=None,
        description="Number of denoising steps. If absent, the default of the model (shipped checkpoints: 100 for "
        "`default`, 4 for `fast`).",
        json_schema_extra=may_be_absent,
    )
    sampler: SamplerName = Field(
        default=None,
        description="ddpm: ancestral sampling with the posterior variance. ddim: deterministic. dpmpp: "
        "DPM-Solver++(2M). If absent, the default of the model (shipped checkpoints: ddpm for `default`, ddim for "
        "`fast`).",
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


PROMPT_NEEDS_A_SCALE: JsonDict = {
    "if": {"required": ["clip_prompt"]},
    "then": {
        "required": ["clip_guidance_scale"],
        "properties": {"clip_guidance_scale": {"exclusiveMinimum": 0}},
    },
}


class GenerateRequest(SamplingRequest):
    """The images to generate. On a CPU a request with the same fields and seed gives the same bytes under any load.

    On a GPU such images may differ, depending on the load.
    """

    model_config = ConfigDict(json_schema_extra={"allOf": [PROMPT_NEEDS_A_SCALE]})

    digit: Annotated[int, Field(ge=0, le=9, description="The digit to generate."), WHOLE]
    clip_guidance_scale: Annotated[Number, Field(ge=0, le=MAX_CLIP_GUIDANCE_SCALE)] = Field(
        default=0,
        description="Scale of CLIP guidance: the distance by which a step moves the predicted image towards the "
        "prompt. 0 turns CLIP guidance off. Without a CLIP model, a value above 0 is answered with 501.",
    )
    clip_prompt: Annotated[Prompt | None, NOT_NULL] = Field(
        default=None,
        description='The prompt of CLIP guidance. The default for the digit 7 is "a handwritten digit seven". A prompt '
        "is permitted only with a clip_guidance_scale above 0.",
        json_schema_extra=may_be_absent,
    )


class ModelName(BaseModel):
    """A model, and the digest of its file or of its weights."""

    name: str
    sha256: str


class ClipName(BaseModel):
    """The CLIP model. `embedded` is the model that ships with unfog."""

    name: str
    sha256: str


class GeneratedImage(BaseModel):
    """One image as a PNG file in base64."""

    index: int
    png: str


def phases_of(timings: Timings) -> tuple[float, float]:
    """Returns the seconds that a finished job waited in the queue, and that its denoising took."""
    submitted = timings.submitted_at
    started, finished = timings.started_at or submitted, timings.finished_at or submitted
    return started - submitted, finished - started


class Timing(BaseModel):
    """Seconds that the request waited in the queue, that its denoising took, and that it took in total."""

    queue_seconds: float
    denoise_seconds: float
    total_seconds: float

    @classmethod
    def of(cls, timings: Timings) -> "Timing":
        """Returns the times of a finished job. The total time ends with this call."""
        queue, denoise = phases_of(timings)
        return cls(
            queue_seconds=round(queue, 6),
            denoise_seconds=round(denoise, 6),
            total_seconds=round(time.monotonic() - timings.submitted_at, 6),
        )


Evaluations = Annotated[
    int,
    Field(description="Number of network evaluations of each image, without the search for its digit."),
]


class ImagesResponse(BaseModel):
    """The images, and the values that are needed to reproduce them."""

    digit: int | None = Field(description="The class of the images, or null if no class was assumed.")
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

    digit: int
    clip_guidance_scale: float
    clip_prompt: str | None = Field(description="The prompt of CLIP guidance, or null without CLIP guidance.")
    clip: ModelName | None = Field(description="The model of CLIP guidance, or null without CLIP guidance.")
    warning: str | None = Field(
        description="Why the prompt of CLIP guidance probably does not have the expected effect, or null."
    )


class AcceptedEvent(BaseModel):
    """The first event of a stream. The request has been admitted."""

    job: int = Field(description="Number of the job, as in the events of GET /events/batch.")
    seed: int
    position: int = Field(description="Number of images in the queue when the request was admitted.")
    eta_seconds: float = Field(description="Estimated seconds until the last image is finished.")


class ProgressEvent(BaseModel):
    """A denoising step is finished. The preview of an image is its predicted final state (x_0)."""

    step: int
    of: int = Field(description="Total number of steps.")
    previews: list[str] = Field(description="One PNG in base64 per image, not enlarged.")
    x_t: list[str] | None = Field(
        default=None,
        description="With include=x_t: one PNG in base64 per image of its x_t after this step, clipped to 0 to 255.",
        json_schema_extra=may_be_absent,
    )


class DoneEvent(BaseModel):
    """The last event of a stream, after all images."""

    seed: int
    evaluations: Evaluations
    timing: Timing
    warning: str | None = Field(
        default=None,
        description="Why the prompt of CLIP guidance probably does not have the expected effect.",
        json_schema_extra=may_be_absent,
    )


class HealthModel(ModelName):
    """A served model."""

    num_parameters: int


class Queue(BaseModel):
    """Images before their first step, images between their first and last step, and the maximum of waiting images."""

    waiting: int
    running: int
    capacity: int


class Health(BaseModel):
    """The state of the service. The fields model, models, device, dtype and compiled are absent during the start."""

    status: Literal["ok", "starting", "draining", "failed"]
    version: str
    model: HealthModel | None = None  # the default model
    models: list[HealthModel] | None = None
    device: str | None = None
    dtype: str | None = None
    compiled: bool | None = None  # True if the denoising step of every model is compiled
    queue: Queue
    uptime_seconds: float


class Liveness(BaseModel):
    """`alive` is false if the engine has failed or is stuck. The process must then be restarted."""

    alive: bool


class Readiness(BaseModel):
    """`ready` is true if new requests are accepted."""

    ready: bool


class Problem(BaseModel):
    """A problem document (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    errors: list[dict[str, Any]] | None = None
