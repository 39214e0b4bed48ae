"""Turns a task into a job, waits for its results and responds. Defines the service object that the routes share."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, TypeVar, cast

import numpy as np
from fastapi import Depends, Request
from starlette.responses import Response

from app import errors
from app.api.animations import (
    Animation,
    AnimationEncoder,
    FrameCollector,
    encode_animation,
    num_frames_of,
    num_pixels_of,
)
from app.api.clip_warnings import prompt_warning
from app.api.context import RequestContext, context_of
from app.api.events import EventFormat, EventStream, JobEvents, Mailbox, UnfogEvents
from app.api.images import encode_base64, encode_images, encode_sheet, encode_zip, sheet_text
from app.api.options import either
from app.api.requests import ClientGoneError, cancel_on_disconnect
from app.api.responses import ANIMATIONS, EVENTS, JSON, PNG, ZIP
from app.api.schemas import GeneratedImage, ModelName, Timing, phases_of
from app.api.stream_options import NO_STREAM, StreamOptions
from app.api.task import Task
from app.api.uploads import ImageReader
from app.engine.clip_worker import ClipWorker, Embedding, Scores
from app.engine.engine import Engine
from app.engine.interface import ClipInfo, ModelInfo
from app.engine.job import (
    DEFAULT_MODEL,
    ClipTarget,
    FrameRequest,
    Job,
    JobRequest,
    Listener,
    Options,
    Pixels,
    Result,
)
from app.metrics import Metrics
from app.settings import OFF, Settings
from model.clip import ClipNotInstalledError, digit_prompt
from model.png import ClipProvenance, Provenance
from model.sampler import Sampler

CLIP_OFF = "CLIP is turned off (UNFOG_CLIP=off). Start the service with UNFOG_CLIP=auto"
# Images with at most this number of pixels together, after their enlargement, are encoded in the event loop. This takes
# 0.1 ms. A thread would add 0.2 ms, and take the interpreter's lock from the engine.
MAX_SMALL_PIXELS = 4096
MIN_TIMEOUT = 1e-3  # seconds that are left for the steps of a request whose prompt took almost all of its time
T = TypeVar("T")


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
    """The objects of a running service that its routes use."""

    settings: Settings
    engine: Engine
    metrics: Metrics
    started_at: float
    pictures: ImageReader
    clip: ClipWorker = field(default_factory=ClipWorker)
    animations: AnimationEncoder = field(default_factory=AnimationEncoder)
    mailbox: Mailbox = field(default_factory=Mailbox)
    in_flight: InFlight = field(default_factory=InFlight)

    @property
    def uptime_seconds(self) -> float:
        """The time since the application was created."""
        return time.monotonic() - self.started_at

    def info(self, model: str) -> ModelInfo:
        """Returns a model.

        Raises InvalidRequest if the name is unknown. Raises Starting or EngineFailed if no model is loaded.
        """
        models = self.engine.models
        if not models:
            self.engine.state.refuse_unless_ok()
            raise errors.Starting(1)
        if model not in models:
            raise errors.InvalidRequest.of("model", f"Input should be {either(models)}")
        return models[model]

    @property
    def clip_info(self) -> ClipInfo:
        """The loaded CLIP model.

        Raises NotAvailable if the service runs without one. Raises Starting or EngineFailed if no model is loaded.
        """
        self.info(DEFAULT_MODEL)
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
        context.answered.enter_context(self.in_flight.one())
        return future

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

        Raises InvalidRequest if a limit of the settings does not permit it, and Overloaded if it is not admitted now.
        """
        self.check(task)
        job = Job(
            JobRequest(
                task.options,
                task.count,
                task.timeout or self.settings.request_timeout,
                stream.num_previews,
                listener,
                self.info(task.options.model).guided_steps_of(task.options, has_digit=task.search is not None),
                context.request_id,
                task.input,
                task.comparison,
                task.search,
                stream.includes_x_t,
                task.images,
                task.clip,
                frames,
            )
        )
        self.engine.submit(job, is_accepted=task.clip is not None)
        context.job = job
        context.answered.enter_context(self.in_flight.one())
        return job

    def provenance(self, task: Task, job: Job) -> Provenance:
        """Returns the provenance for the PNG files of a task. A search for the digit must be finished."""
        options, clip = task.options, None
        if task.clip:
            clip = ClipProvenance(options.clip_guidance_scale, options.clip_prompt, task.clip_sha256)
        return Provenance(
            digit="none" if job.digit is None else job.digit,
            seed=options.seed,
            sampler=options.sampler,
            num_steps=task.num_steps,
            guidance_scale=options.guidance_scale,
            model_sha256=self.info(options.model).sha256,
            task=task.chunks,
            first_index=task.images[0].index if task.images else 0,
            clip=clip,
        )

    def check(self, task: Task) -> None:
        """Raises the errors of `submit`, except Overloaded and those of a change of the state after the call."""
        limit = self.settings.largest_request
        if task.count > limit:
            raise errors.InvalidRequest.of("count", f"Input should be less than or equal to {limit}")
        self._check_timeout(task.timeout)
        if not task.clip:  # A request that has waited for CLIP is also admitted during a drain.
            self.engine.apparent_state.refuse_unless_ok()

    def timeout_of(self, requested: float | None) -> float:
        """Returns the timeout in seconds of work that the engine does not do: embeddings of CLIP.

        Raises InvalidRequest if the requested one is too long.
        """
        return self._check_timeout(requested) or self.settings.short_timeout

    def _check_timeout(self, requested: float | None) -> float | None:
        """Returns the requested timeout. Raises InvalidRequest if it is too long."""
        longest = self.settings.longest_timeout
        if requested is not None and requested > longest:
            raise errors.InvalidRequest.of("timeout_seconds", f"Input should be less than or equal to {longest:g}")
        return requested


async def guided_by_clip(request: Request, service: Service, task: Task) -> Task:
    """Returns the task with the embedding of its prompt and the response fields about CLIP guidance.

    Returns a task without CLIP guidance unchanged. It has the response fields of NO_CLIP. Otherwise the request is in
    flight from now on, so that a drain waits for its prompt and for its images.

    Raises NotAvailable if the task has CLIP guidance and the service has no CLIP model, DeadlineExceeded if the prompt
    was not embedded before the deadline, ClientGoneError after a disconnect, and InvalidRequest for a timeout that is
    too long.
    """
    options = task.options
    if not options.clip_guidance_scale:
        return task
    clip, deadline = service.clip_info, time.monotonic() + service.timeout_of(task.timeout)
    service.engine.apparent_state.refuse_unless_ok()
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            embedded = asyncio.wrap_future(service.clip.embed_prompts([options.clip_prompt]))
            context_of(request.scope).answered.enter_context(service.in_flight.one())
            (text,) = await cancel_on_disconnect(request, embedded)
    except TimeoutError:
        raise errors.DeadlineExceeded from None
    steps = service.info(options.model).clip_steps(options)
    facts = {
        "clip_guidance_scale": options.clip_guidance_scale,
        "clip_prompt": options.clip_prompt,
        "clip": ModelName(name=clip.name, sha256=clip.sha256),
        "warning": await _warning(service, options, text),
    }
    has_deadline = task.timeout or service.settings.request_timeout  # otherwise the engine chooses one for the images
    return replace(
        task,
        timeout=max(deadline - time.monotonic(), MIN_TIMEOUT) if has_deadline else None,
        clip=ClipTarget(options.clip_guidance_scale, text, steps, service.engine.clip_evaluations),
        clip_sha256=clip.sha256,
        facts={**task.facts, **facts},
    )


async def _warning(service: Service, options: Options, embedding: Embedding) -> str | None:
    """Returns the warning about the prompt of a request with CLIP guidance, or None."""
    digit, similarities = options.digit, None
    assert service.engine.clip
    assert digit is not None, "requests with CLIP guidance have a digit"
    unknown = await asyncio.to_thread(service.engine.clip.unknown_words, [options.clip_prompt])
    prompts = service.info(options.model).prompts
    if prompts[digit] == digit_prompt(digit):  # The real digits are images of this class.
        similarities = service.clip.compare_with_real_digits(digit, embedding)
    return prompt_warning(unknown, digit, similarities)


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


async def answer(request: Request, service: Service, task: Task, media_type: str, stream: StreamOptions) -> Response:
    """Submits a task and returns the response of type `media_type`.

    Raises the errors of Service.submit and finish.
    """
    if media_type == EVENTS:

        def events_of(job: Job) -> UnfogEvents:
            return UnfogEvents(partial(service.provenance, task, job), task.scale, task.facts.get("warning"))

        return event_stream(request, service, task, stream, events_of)

    if media_type in ANIMATIONS:
        return await _animation(request, service, task, media_type, stream.num_previews)

    encode = partial(encode_answer, service, task, media_type)
    return await finished_response(request, service, task, encode, media_type)


async def _animation(request: Request, service: Service, task: Task, media_type: str, num_previews: int) -> Response:
    """Submits a task and returns the animation of its images. See num_frames_of for `num_previews`.

    Raises InvalidRequest if the animation would be too large, Overloaded if too many animations are pending, and the
    errors of Service.submit and finish.
    """
    num_frames = num_frames_of(num_previews, task.options.num_steps)
    num_pixels = num_pixels_of(service.info(task.options.model).image_shape, task.count, task.scale, num_frames)
    service.check(task)  # Its errors precede Overloaded.
    collector = FrameCollector(num_frames, task.count)

    def encode(job: Job, images: list[Pixels]) -> bytes:
        text = sheet_text(service.provenance(task, job), task.count)
        return encode_animation(media_type, collector.sheets(images), text, task.scale)

    animation = Animation(FrameRequest(num_frames, collector.add), num_pixels)
    with service.animations.admit(num_pixels):
        return await finished_response(request, service, task, encode, media_type, animation)


def encode_answer(service: Service, task: Task, media_type: str, job: Job, images: list[Pixels]) -> bytes:
    """Returns the body of the response of a finished job: JSON, a PNG file or a ZIP archive."""
    provenance = service.provenance(task, job)
    if media_type == JSON:
        return _encode_json(service, job, task, images, provenance)
    encode = {PNG: encode_sheet, ZIP: encode_zip}[media_type]
    return encode(images, provenance, task.scale)


def event_stream(
    request: Request,
    service: Service,
    task: Task,
    stream: StreamOptions,
    format_of: Callable[[Job], EventFormat],
) -> EventStream:
    """Submits a task and returns the stream of its events. Raises the errors of Service.submit."""
    events = JobEvents(task.count * stream.images_per_preview, service.mailbox)
    job = service.submit(task, context_of(request.scope), stream, events.put)
    return EventStream(job, events, service.engine.cancel, format_of(job), service.metrics)


async def finished_response(
    request: Request,
    service: Service,
    task: Task,
    encode: Callable[[Job, list[Pixels]], bytes],
    media_type: str,
    animation: Animation | None = None,
) -> Response:
    """Submits a task, waits for its images and returns the response. `encode` runs as in `encoded`.

    Raises the errors of Service.submit and finish.
    """
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
    queue, denoise = phases_of(job.timings)
    encode = context.encode_seconds
    return f"queue;dur={1000 * queue:.3f}, denoise;dur={1000 * denoise:.3f}, encode;dur={1000 * encode:.3f}"


def _encode_json(service: Service, job: Job, task: Task, images: list[Pixels], provenance: Provenance) -> bytes:
    pngs = encode_images(images, provenance, task.scale)
    options = task.options
    response = task.response(
        digit=job.digit,
        count=task.count,
        seed=options.seed,
        num_steps=task.num_steps,
        sampler=cast(Sampler, options.sampler),  # only recognition has another process
        guidance_scale=options.guidance_scale,
        model=ModelName(name=options.model, sha256=service.info(options.model).sha256),
        evaluations=job.request.network_evaluations,
        images=[GeneratedImage(index=i, png=encode_base64(png)) for i, png in enumerate(pngs, provenance.first_index)],
        timing=Timing.of(job.timings),
        **task.facts,
        **task.result_facts(),
    )
    return response.model_dump_json().encode()


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDependency = Annotated[Service, Depends(_service)]
