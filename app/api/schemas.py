"""The schemas of requests and answers in JSON."""

import secrets
import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidatorFunctionWrapHandler, WrapValidator

from app.engine.job import DEFAULT_MODEL, FAST_MODEL, Timings
from model.sampler import MAX_GUIDANCE_SCALE, Sampler

MAX_SEED = 2**53 - 1  # the largest integer that every JSON parser reads exactly


def _whole(value: Any) -> Any:
    """Converts a whole float: 7.0 is the integer 7 (JSON Schema draft 2020-12, section 6.1.1)."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _refuse_null(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """Refuses null with the message for a value of a wrong type. A client leaves a field out or gives it a value."""
    return handler(object() if value is None else value)


def _may_be_absent(schema: dict[str, Any]) -> None:
    """Describes a field that a client may leave out, but not set to null."""
    schema.pop("default")
    schema.update(schema.pop("anyOf")[0])


WHOLE = BeforeValidator(_whole)  # must follow the bounds: otherwise pydantic does not write them into the schema
NOT_NULL = WrapValidator(_refuse_null)
Number = Annotated[float, Field(allow_inf_nan=False)]


class GenerateRequest(BaseModel):
    """What to draw. On a CPU the same fields with the same seed give the same bytes under any load.

    On a GPU such images may differ in the last bits of the network's precision from load to load.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    digit: Annotated[int, Field(ge=0, le=9, description="the class to draw"), WHOLE]
    count: Annotated[int, Field(ge=1, description="how many images, at most UNFOG_MAX_COUNT"), WHOLE] = 1
    seed: Annotated[int, Field(ge=0, le=MAX_SEED, description="drawn by the server when absent"), WHOLE] = Field(
        default_factory=lambda: secrets.randbelow(MAX_SEED + 1)
    )
    num_steps: Annotated[Annotated[int, Field(ge=1, le=100), WHOLE] | None, NOT_NULL] = Field(
        default=None,
        description="steps of the reverse process; the model's own when absent: 100 of `default`",
        json_schema_extra=_may_be_absent,
    )
    sampler: Annotated[Sampler | None, NOT_NULL] = Field(
        default=None,
        description="ancestral with the posterior variance; deterministic; DPM-Solver++(2M); the model's own when "
        "absent: ddpm of `default`",
        json_schema_extra=_may_be_absent,
    )
    guidance_scale: Annotated[Annotated[Number, Field(ge=1, le=MAX_GUIDANCE_SCALE)] | None, NOT_NULL] = Field(
        default=None,
        description="1 = off; the checkpoint's when absent",
        json_schema_extra=_may_be_absent,
    )
    scale: Annotated[int, Field(ge=1, le=16, description="enlarges each image by whole pixels"), WHOLE] = 1
    model: str = Field(
        default=DEFAULT_MODEL, max_length=128, description=f"which checkpoint draws: {DEFAULT_MODEL} or {FAST_MODEL}"
    )
    timeout_seconds: Annotated[Annotated[Number, Field(gt=0)] | None, NOT_NULL] = Field(
        default=None,
        description="past it the request is answered 504; at most, and when absent, UNFOG_REQUEST_TIMEOUT",
        json_schema_extra=_may_be_absent,
    )


class ModelName(BaseModel):
    """Which weights drew."""

    name: str
    sha256: str


class GeneratedImage(BaseModel):
    """One image, a PNG in base64."""

    index: int
    png: str


class Timing(BaseModel):
    """Where the time went, in seconds."""

    queue_seconds: float
    denoise_seconds: float
    total_seconds: float

    @classmethod
    def of(cls, timings: Timings) -> "Timing":
        """Returns the times of a finished job; the total is until now."""
        submitted = timings.submitted_at
        started, finished = timings.started_at or submitted, timings.finished_at or submitted
        return cls(
            queue_seconds=round(started - submitted, 6),
            denoise_seconds=round(finished - started, 6),
            total_seconds=round(time.monotonic() - submitted, 6),
        )


class GenerateResponse(BaseModel):
    """The images, and all that is needed to draw them again."""

    digit: int
    count: int
    seed: int
    num_steps: int
    sampler: Sampler
    guidance_scale: float
    model: ModelName
    images: list[GeneratedImage]
    timing: Timing


class AcceptedEvent(BaseModel):
    """First event of a stream: the request was admitted."""

    seed: int
    position: int = Field(description="images that were waiting when the request was admitted")
    eta_seconds: float = Field(description="estimated seconds until the last image")


class ProgressEvent(BaseModel):
    """The reverse process has reached a step. An image's preview is its predicted x_0."""

    step: int
    of: int = Field(description="steps in total")
    previews: list[str] = Field(description="one PNG in base64 for each image, not enlarged")


class DoneEvent(BaseModel):
    """Last event of a stream whose images are all finished."""

    seed: int
    timing: Timing


class HealthModel(ModelName):
    """The model that is served."""

    num_parameters: int


class Queue(BaseModel):
    """Images waiting for their first step, images between their steps, and how many may wait."""

    waiting: int
    running: int
    capacity: int


class Health(BaseModel):
    """The state of the service; models, device, dtype and compiled are absent while it starts."""

    status: Literal["ok", "starting", "draining", "failed"]
    version: str
    model: HealthModel | None = None  # the default model
    models: list[HealthModel] | None = None
    device: str | None = None
    dtype: str | None = None
    compiled: bool | None = None  # True if the step of every model is compiled, which changes bits
    queue: Queue
    uptime_seconds: float


class Liveness(BaseModel):
    """Whether the process is alive: the answer itself, and the engine's heartbeat."""

    alive: bool


class Readiness(BaseModel):
    """Whether new work is taken."""

    ready: bool


class Problem(BaseModel):
    """An error, RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    errors: list[dict[str, Any]] | None = None
