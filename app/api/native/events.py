"""The events of a stream: accepted, progress and image events, then done or error."""

from collections.abc import Callable

from pydantic import BaseModel, Field

from app.api.http.events import event_text
from app.api.native.schemas import Evaluations, GeneratedImage, Timing
from app.engine.job import ImageDone, Job, Pixels, Progress
from app.errors import UnfogError
from app.tasks.fields import may_be_absent
from app.tasks.images import encode_base64, encode_image
from app.tasks.task import Task
from model.png import Provenance


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

    label: str | None = Field(
        default=None,
        description="The name of the class of the images. Absent if no class was assumed or the images have different "
        "ones.",
        json_schema_extra=may_be_absent,
    )
    digit: int | None = Field(
        default=None,
        description="The digit of the images. Absent if the classes are not digits, and wherever label is absent.",
        json_schema_extra=may_be_absent,
    )
    labels: list[str] | None = Field(
        default=None,
        description="The name of the class of each image. Absent unless the request has `labels`.",
        json_schema_extra=may_be_absent,
    )
    seed: int
    evaluations: Evaluations
    timing: Timing
    warning: str | None = Field(
        default=None,
        description="Why the prompt of CLIP guidance probably does not have the expected effect.",
        json_schema_extra=may_be_absent,
    )


class UnfogEvents:
    """The events accepted, progress, image, done and error of this service."""

    preview_scale = 1

    def __init__(self, provenance: Callable[[], Provenance], task: Task) -> None:
        self._provenance, self._task, self.image_scale = provenance, task, task.scale

    def accepted(self, job: Job) -> str:
        assert job.estimate, "the job was not admitted"
        eta_seconds = round(job.estimate.seconds, 3)
        seed = job.request.options.seed
        accepted = AcceptedEvent(job=job.number, seed=seed, position=job.estimate.position, eta_seconds=eta_seconds)
        return event_text("accepted", accepted.model_dump())

    def progress(self, event: Progress) -> str:
        x_t = None if event.x_t is None else _encode_all(event.x_t)
        progress = ProgressEvent(step=event.step, of=event.of, previews=_encode_all(event.previews), x_t=x_t)
        return event_text("progress", progress.model_dump(exclude_none=True))

    def image(self, event: ImageDone) -> str:
        png = encode_image(event.pixels, self.image_scale, self._provenance().text(event.index))
        return event_text("image", GeneratedImage(index=event.index, png=encode_base64(png)).model_dump())

    def done(self, job: Job) -> str:
        seed, evaluations = job.request.options.seed, job.request.network_evaluations
        timing = Timing.of(job.timings)
        warning, facts = self._task.facts.get("warning"), self._task.class_facts(job.label)
        labels = self._task.label_names or None
        done = DoneEvent(labels=labels, seed=seed, evaluations=evaluations, timing=timing, warning=warning, **facts)
        return event_text("done", done.model_dump(exclude_none=True))

    def error(self, error: UnfogError, request_id: str) -> str:
        return event_text("error", error.problem(request_id))


def _encode_all(images: list[Pixels]) -> list[str]:
    return [encode_base64(encode_image(pixels)) for pixels in images]
