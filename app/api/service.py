"""The service as the routes use it: submits tasks to the engine and to CLIP, waits for the results and encodes them."""

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Protocol, TypeVar

import numpy as np
from fastapi import Depends, Request
from starlette.responses import Response

from app import errors
from app.api.http.animations import (
    Animation,
    AnimationEncoder,
    FrameCollector,
    encode_animation,
    num_frames_of,
    num_pixels_of,
)
from app.api.http.context import RequestContext, context_of
from app.api.http.events import MAX_SMALL_PIXELS, NO_STREAM, EventFormat, EventStream, JobEvents, Mailbox, StreamOptions
from app.api.http.media_types import ANIMATIONS, EVENTS
from app.api.http.requests import ClientGoneError, cancel_on_disconnect
from app.api.http.uploads import ImageReader
from app.batches.service import BatchService
from app.engine.clip_worker import ClipWorker, Embedding, Scores
from app.engine.engine import Engine
from app.engine.interface import ClipInfo, ModelInfo
from app.engine.job import FrameRequest, Job, Listener, Pixels, Result
from app.errors import FieldError
from app.metrics import Metrics
from app.settings import OFF, Settings
from app.tasks.clip_warnings import prompt_warning
from app.tasks.from_image import PictureFields, check_model
from app.tasks.generate import with_clip
from app.tasks.images import sheet_text
from app.tasks.names import either
from app.tasks.task import Task
from model.clip import ClipNotInstalledError
from model.png import Provenance

CLIP_OFF = "CLIP is turned off (UNFOG_CLIP=off). Start the service with UNFOG_CLIP=auto"
MIN_TIMEOUT = 1e-3  # seconds that are left for the steps of a request whose prompt took almost all of its time
T = TypeVar("T")
P = TypeVar("P", bound=PictureFields)


class InFlight:
    """Counts the requests in flight: from admission until the response is sent or the client has disconnected.

    It is not thread-safe: only the event loop may use it.
    """

    def __init__(self) -> None:
        self._count = 0
        self._none = asyncio.Event()
        self._none.set()

    @contextmanager
    def one(self) -> Iterator[None]:
        """Counts one request for the duration of the block."""
        self._count += 1
        self._none.clear()
        try:
            yield
        finally:
            self._count -= 1
            if not self._count:
                self._none.set()

    async def none(self) -> None:
        """Waits until no request is in flight."""
        await self._none.wait()


@dataclass(frozen=True, slots=True)
class Service:
    """The parts of the running service that all routes share."""

    settings: Settings
    engine: Engine
    metrics: Metrics
    started_at: float
    pictures: ImageReader
    batches: BatchService
    clip: ClipWorker = field(default_factory=ClipWorker)
    animations: AnimationEncoder = field(default_factory=AnimationEncoder)
    mailbox: Mailbox = field(default_factory=Mailbox)
    in_flight: InFlight = field(default_factory=InFlight)
    clip_lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # held by the line of a batch that uses CLIP

    @property
    def uptime_seconds(self) -> float:
        """The time since the application was created."""
        return time.monotonic() - self.started_at

    @property
    def models(self) -> dict[str, ModelInfo]:
        """The served models by name. The first one is the default.

        Raises Starting or EngineFailed if no model is loaded.
        """
        models = self.engine.models
        if not models:
            self.engine.state.refuse_unless_ok()
            raise errors.Starting(1)
        return models

    def info(self, model: str | None = None) -> ModelInfo:
        """Returns the model with this name, or the default model for None. Raises FieldError if the name is unknown.

        Also raises the errors of `models`.
        """
        models = self.models
        if model is None:
            return next(iter(models.values()))
        if model not in models:
            raise FieldError("model", f"Input should be {either(models)}")
        return models[model]

    def with_model(self, fields: P) -> tuple[P, ModelInfo]:
        """Returns the fields of a request with a picture and its model.

        Raises FieldError if the model does not support the fields.
        """
        info = self.info(fields.model)
        check_model(info, fields)
        return fields, info

    @property
    def clip_info(self) -> ClipInfo:
        """The loaded CLIP model.

        Raises NotAvailable if the service runs without one. Raises Starting or EngineFailed if no model is loaded.
        """
        _ = self.models
        if self.engine.clip:
            return self.engine.clip.info
        raise errors.NotAvailable(CLIP_OFF if self.settings.clip == OFF else str(ClipNotInstalledError()))

    def score(
        self, images: Sequence[Pixels], prompts: Sequence[str], timeout: float, context: RequestContext
    ) -> Future[Scores]:
        """Submits images and prompts to CLIP. The request is then in flight. Raises Overloaded if it is not admitted.

        Raises Draining or EngineFailed while the service accepts no requests.
        """
        self.engine.apparent_state.refuse_unless_ok()
        future = self.clip.score(images, prompts, timeout)
        self.count_in_flight(context)
        return future

    def count_in_flight(self, context: RequestContext) -> None:
        """Counts a request as in flight until it is answered.

        Lines of batches do not count, so that a drain does not wait for them. They are answered after the next start.
        """
        if not context.is_background:
            context.answered.enter_context(self.in_flight.one())

    def give_up(self, error: errors.UnfogError) -> None:
        """Answers all unfinished requests with the error."""
        self.engine.give_up(error)
        self.clip.close(error)

    def submit(
        self,
        task: Task,
        context: RequestContext,
        stream: StreamOptions = NO_STREAM,
        listener: Listener | None = None,
        frames: FrameRequest | None = None,
    ) -> Job:
        """Submits a task to the engine and returns the job. The request is then in flight.

        A line of a batch has no deadline. Raises FieldError if a limit of the settings does not permit the task, and
        Overloaded if it is not admitted now.
        """
        self.check(task)
        is_background = context.is_background
        request = replace(
            task.job,
            timeout=math.inf if is_background else task.job.timeout or self.settings.request_timeout,
            num_previews=stream.num_previews,
            listener=listener,
            request_id=context.request_id,
            includes_x_t=stream.includes_x_t,
            frames=frames,
            is_background=is_background,
        )
        job = Job(request)
        self.engine.submit(job, is_accepted=request.clip is not None)
        context.job, context.class_facts = job, task.class_facts
        self.count_in_flight(context)
        return job

    def provenance(self, task: Task, job: Job) -> Provenance:
        """Returns the provenance for the PNG files of a task. A search for the class must be finished."""
        return task.provenance(job.label)

    def check(self, task: Task) -> None:
        """Raises the errors of `submit`, except Overloaded and those of a change of the state after the call."""
        limit = self.settings.largest_request
        if task.job.count > limit:
            raise FieldError("count", f"Input should be less than or equal to {limit}")
        self._check_timeout(task.job.timeout)
        if not task.job.clip:  # A request that has waited for CLIP is also admitted during a drain.
            self.engine.apparent_state.refuse_unless_ok()

    def timeout_of(self, requested: float | None) -> float:
        """Returns the timeout in seconds of work that the engine does not do: embeddings of CLIP.

        Raises FieldError if the requested one is too long.
        """
        return self._check_timeout(requested) or self.settings.short_timeout

    def _check_timeout(self, requested: float | None) -> float | None:
        """Returns the requested timeout. Raises FieldError if it is too long."""
        longest = self.settings.longest_timeout
        if requested is not None and requested > longest:
            raise FieldError("timeout_seconds", f"Input should be less than or equal to {longest:g}")
        return requested


async def guided_by_clip(request: Request, service: Service, task: Task) -> Task:
    """Returns the task with the embedding of its prompt and the facts about CLIP guidance.

    Returns a task without CLIP guidance unchanged. Otherwise the request is in flight from now on, so that a drain
    waits for its prompt and for its images.

    Raises NotAvailable if the task has CLIP guidance and the service has no CLIP model, DeadlineExceeded if the prompt
    was not embedded before the deadline, ClientGoneError after a disconnect, and FieldError for a timeout that is too
    long.
    """
    options, timeout, context = task.options, task.job.timeout, context_of(request.scope)
    if not options.clip_guidance_scale:
        return task
    clip, limit, is_line = service.clip_info, service.timeout_of(timeout), context.is_background
    deadline = math.inf if is_line else time.monotonic() + limit
    service.engine.apparent_state.refuse_unless_ok()
    try:
        # At most one line of a batch is in the queue of CLIP, so that other requests are in time.
        async with asyncio.timeout(deadline - time.monotonic()), service.clip_lock if is_line else nullcontext():
            embedded = asyncio.wrap_future(service.clip.embed_prompts([options.clip_prompt]))
            service.count_in_flight(context)
            (text,) = await cancel_on_disconnect(request, embedded)
    except TimeoutError:
        raise errors.DeadlineExceeded from None
    warning = await _warning(service, task, text)
    task = with_clip(task, clip, text, service.engine.clip_evaluations, warning)
    if is_line or not (timeout or service.settings.request_timeout):
        return task  # The engine chooses the timeout of the images, or they have none.
    return replace(task, job=replace(task.job, timeout=max(deadline - time.monotonic(), MIN_TIMEOUT)))


async def _warning(service: Service, task: Task, embedding: Embedding) -> str | None:
    """Returns the warning about the prompt of a request with CLIP guidance, or None."""
    label, info, similarities = task.options.label, task.info, None
    assert service.engine.clip
    assert label is not None, "requests with CLIP guidance name a class"
    unknown = await asyncio.to_thread(service.engine.clip.unknown_words, [task.options.clip_prompt])
    if info.has_digits:  # There are real images only of digits.
        similarities = service.clip.compare_with_real_digits(label, embedding)
    return prompt_warning(unknown, info.class_names[label], similarities)


async def finish(service: Service, request: Request, job: Job) -> list[Result]:
    """Waits for the results of a job. Raises DeadlineExceeded after its timeout, ClientGoneError after a disconnect.

    In both cases, cancels the job.
    """
    cancel, deadline = service.engine.cancel, time.monotonic() + job.timeout
    timer = asyncio.get_running_loop().call_later(job.timeout, cancel, job, errors.DeadlineExceeded())
    try:
        results = await cancel_on_disconnect(request, service.mailbox.result_of(job.future))
    finally:
        timer.cancel()
        cancel(job, ClientGoneError())
    if job.timings.finished_at and job.timings.finished_at > deadline:  # The job ended before the timer ran.
        raise errors.DeadlineExceeded
    return results


class AnswerFormat(Protocol):
    """The formats of the images of a protocol."""

    def events(self, task: Task, provenance: Callable[[], Provenance]) -> EventFormat:
        """Returns the format of the events of a stream."""

    def encode(self, media_type: str, task: Task, job: Job, images: list[Pixels], provenance: Provenance) -> bytes:
        """Returns the body of the answer of a finished job, in a format other than a stream and an animation."""


async def answer(
    request: Request,
    service: Service,
    task: Task,
    answer_format: AnswerFormat,
    media_type: str,
    stream: StreamOptions = NO_STREAM,
) -> Response:
    """Submits a task and returns the answer of type `media_type`.

    Raises the errors of Service.submit and finish, InvalidRequest for an animation that would be too large, and
    Overloaded if too many animations are pending.
    """
    if media_type == EVENTS:
        return event_stream(request, service, task, stream, answer_format)
    if media_type in ANIMATIONS:
        return await _animation(request, service, task, media_type, stream.num_previews)

    def encode(job: Job, images: list[Pixels]) -> bytes:
        return answer_format.encode(media_type, task, job, images, service.provenance(task, job))

    return await _finished(request, service, task, encode, media_type)


async def _animation(request: Request, service: Service, task: Task, media_type: str, num_previews: int) -> Response:
    """Submits a task and returns the animation of its images. See num_frames_of for `num_previews`."""
    num_frames = num_frames_of(num_previews, task.options.num_steps)
    num_pixels = num_pixels_of(task.info.image_shape, task.sheet_shape, task.scale, num_frames)
    service.check(task)  # Its errors precede Overloaded.
    collector = FrameCollector(num_frames, task.job.count, task.sheet_shape)

    def encode(job: Job, images: list[Pixels]) -> bytes:
        text = sheet_text(service.provenance(task, job), task.job.count)
        return encode_animation(media_type, collector.sheets(images), text, task.scale)

    animation = Animation(FrameRequest(num_frames, collector.add), num_pixels)
    with service.animations.admit(num_pixels):
        return await _finished(request, service, task, encode, media_type, animation)


def event_stream(
    request: Request, service: Service, task: Task, stream: StreamOptions, answer_format: AnswerFormat
) -> EventStream:
    """Submits a task and returns the stream of its events.

    Raises the errors of Service.submit, and FieldError for a line of a batch, whose answer is stored as a whole.
    """
    context = context_of(request.scope)
    if context.is_background:
        raise FieldError("stream", "A line of a batch cannot be answered with a stream. Omit this field")
    events = JobEvents(task.job.count * stream.images_per_preview, service.mailbox)
    job = service.submit(task, context, stream, events.put)
    event_format = answer_format.events(task, partial(service.provenance, task, job))
    return EventStream(job, events, service.engine.cancel, event_format, service.metrics)


async def _finished(
    request: Request,
    service: Service,
    task: Task,
    encode: Callable[[Job, list[Pixels]], bytes],
    media_type: str,
    animation: Animation | None = None,
) -> Response:
    """Submits a task, waits for its images and returns the answer. `encode` runs as in `encoded`."""
    content, timing = await encoded(request, service, task, encode, animation)
    headers = {"X-Seed": str(task.options.seed), "Server-Timing": timing}
    return Response(content, media_type=media_type, headers=headers)


async def encoded(
    request: Request,
    service: Service,
    task: Task,
    encode: Callable[[Job, list[Pixels]], T],
    animation: Animation | None = None,
) -> tuple[T, str]:
    """Submits a task and waits for its images. Returns the result of `encode` and the value of Server-Timing.

    `encode` runs in a thread, unless the images are small. An animation, which must be admitted, has its own thread.
    Raises the errors of Service.submit and finish.
    """
    context = context_of(request.scope)
    job = service.submit(task, context, frames=animation.frames if animation else None)
    results = await finish(service, request, job)
    images = [result for result in results if isinstance(result, np.ndarray)]
    is_small = sum(image.size for image in images) * task.scale**2 <= MAX_SMALL_PIXELS
    with context.encoding(service.metrics):
        if animation:
            content = await service.animations.run(request, partial(encode, job, images), animation.num_pixels)
        else:
            content = encode(job, images) if is_small else await asyncio.to_thread(encode, job, images)
    return content, server_timing(job, context)


def server_timing(job: Job, context: RequestContext) -> str:
    """Returns the value of the header Server-Timing, in milliseconds."""
    queue, denoise = job.timings.phases
    encode = context.encode_seconds
    return f"queue;dur={1000 * queue:.3f}, denoise;dur={1000 * denoise:.3f}, encode;dur={1000 * encode:.3f}"


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDependency = Annotated[Service, Depends(_service)]
