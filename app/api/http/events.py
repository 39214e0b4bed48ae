"""Sends the progress of a job as server-sent events. Each protocol has its own format of the events."""

import asyncio
import concurrent.futures
import json
import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, Protocol, TypeVar

from fastapi import Depends, Query, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.api.http.context import CLIENT_GONE, RequestContext, context_of
from app.api.http.media_types import EVENTS
from app.api.http.requests import ClientGoneError, cancel_on_disconnect
from app.engine.job import ImageDone, Job, Progress
from app.errors import DeadlineExceeded, InternalError, UnfogError
from app.metrics import Metrics

log = logging.getLogger(__name__)

MAX_WAITING_PREVIEWS = 256  # unsent preview images per job
# At most this number of images, with at most this number of pixels together after their enlargement, are encoded in the
# event loop. This takes 0.1 ms. A thread would add 0.2 ms, and take the interpreter's lock from the engine.
MAX_SMALL_IMAGES, MAX_SMALL_PIXELS = 4, 4096
T = TypeVar("T")
Cancel = Callable[[Job, Exception], None]  # completes a job with an error and frees its rows


Previews = Annotated[
    int,
    Query(
        ge=0,
        le=100,
        description="Approximate number of progress events of a stream, or number of frames of an animation, which has "
        "at most one for each step. Other formats ignore it.",
        examples=[10],
    ),
]
Include = Annotated[
    Literal["x_t"],
    Query(description="x_t: each progress event also has x_t of each image. Other formats ignore it."),
]


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """The number of progress events of a stream or of frames of an animation, and the content of the events."""

    num_previews: int = 0
    includes_x_t: bool = False

    @property
    def images_per_preview(self) -> int:
        """The number of pictures of one image in a progress event."""
        return 2 if self.includes_x_t else 1


NO_STREAM = StreamOptions()


async def _stream_options(
    previews: Previews = 10,
    include: Include = None,  # type: ignore[assignment] # FastAPI does not validate the default
) -> StreamOptions:
    return StreamOptions(previews, includes_x_t=include == "x_t")


StreamOptionsDependency = Annotated[StreamOptions, Depends(_stream_options)]


class Mailbox:
    """Passes calls from the engine thread to the event loop, together for all jobs (see Engine.deliver)."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: int | None = None  # the thread of the event loop
        self._calls: deque[Callable[[], None]] = deque()
        self._is_woken = False  # True if the event loop will make the calls

    def open(self) -> None:
        """Uses the running event loop from now on."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop, self._thread, self._is_woken = loop, threading.get_ident(), False

    def put(self, call: Callable[[], None]) -> None:
        """Adds a call. Any thread may call this. A call from another thread than the event loop waits for `deliver`."""
        self._calls.append(call)
        if threading.get_ident() == self._thread:
            self.deliver()

    def result_of(self, work: "concurrent.futures.Future[T]") -> "asyncio.Future[T]":
        """Returns a future of the event loop with the result of the work. `deliver` completes it."""
        self.open()
        result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        work.add_done_callback(lambda done: self.put(partial(_complete, result, done)))
        return result

    def deliver(self) -> None:
        """Passes the calls to the event loop. Any thread may call it. Does nothing if the event loop is closed."""
        if self._calls and self._loop and not self._is_woken:
            self._is_woken = True
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._make_calls)

    def _make_calls(self) -> None:
        self._is_woken = False
        while self._calls:
            self._calls.popleft()()


def _complete(result: "asyncio.Future[T]", work: "concurrent.futures.Future[T]") -> None:
    if result.done():  # it was cancelled
        return
    if error := work.exception():
        result.set_exception(error)
    else:
        result.set_result(work.result())


class JobEvents:
    """Passes the events of a job from the engine thread to the event loop.

    Images are kept until they are sent. If the client reads slowly, only the newest previews are kept.
    """

    def __init__(self, num_images: int, mailbox: Mailbox) -> None:
        """`num_images` is the number of images in a Progress event."""
        mailbox.open()
        self._mailbox = mailbox
        self._waiting: deque[Progress | ImageDone | None] = deque()
        self._max_progress = max(1, MAX_WAITING_PREVIEWS // num_images)
        self._arrived = asyncio.Event()

    def put(self, event: Progress | ImageDone | None) -> None:
        """Adds an event. None marks the end. Any thread may call it."""
        self._mailbox.put(partial(self._add, event))

    async def get(self) -> tuple[list[Progress | ImageDone], bool]:
        """Waits for events. Returns all unsent events in order, and True if no further event follows."""
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        waiting = list(self._waiting)
        self._waiting.clear()
        return [event for event in waiting if event is not None], waiting[-1] is None

    def _add(self, event: Progress | ImageDone | None) -> None:
        self._waiting.append(event)
        if isinstance(event, Progress):
            places = [place for place, waiting in enumerate(self._waiting) if isinstance(waiting, Progress)]
            if len(places) > self._max_progress:
                del self._waiting[places[0]]
        self._arrived.set()


def event_text(name: str, data: dict[str, Any]) -> str:
    """Formats one server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


class EventFormat(Protocol):
    """Formats the events of a job as server-sent events. An empty text means that no event is sent."""

    image_scale: int  # enlargement factor of the images
    preview_scale: int  # enlargement factor of the previews

    def accepted(self, job: Job) -> str:
        """Returns the first event."""

    def progress(self, event: Progress) -> str:
        """Returns the events for the progress of the job."""

    def image(self, event: ImageDone) -> str:
        """Returns the event for a finished image."""

    def done(self, job: Job) -> str:
        """Returns the last event of a job without error."""

    def error(self, error: UnfogError, request_id: str) -> str:
        """Returns the last event of a job that has failed."""


class EventResponse(ABC, Response):
    """A response that sends events until they end or the client disconnects. Subclasses send them."""

    media_type = EVENTS

    def __init__(self, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(headers={**(headers or {}), "Cache-Control": "no-store"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, context = Request(scope, receive), context_of(scope)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if not context.is_head:
            try:
                await cancel_on_disconnect(request, self._send_events(context, send))
            except ClientGoneError:
                context.outcome = CLIENT_GONE
                return
        await send({"type": "http.response.body", "body": b""})

    @abstractmethod
    async def _send_events(self, context: RequestContext, send: Send) -> None:
        """Sends all events. An error ends them with an event `error`."""


class EventStream(EventResponse):
    """Sends the events of a job. If the client disconnects, cancels the job, which frees its rows.

    The deadline of the request applies to the generation of the images, not to their transfer. UNFOG_WRITE_TIMEOUT
    limits the transfer, as on every connection.
    """

    def __init__(
        self,
        job: Job,
        events: JobEvents,
        cancel: Cancel,
        event_format: EventFormat,
        metrics: Metrics,
    ) -> None:
        super().__init__({"X-Seed": str(job.request.options.seed)})
        self._job, self._events, self._cancel = job, events, cancel
        self._format, self._metrics = event_format, metrics
        job.future.add_done_callback(lambda _: events.put(None))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        deadline = asyncio.get_running_loop().call_later(self._job.timeout, self._cancel, self._job, DeadlineExceeded())
        try:
            await super().__call__(scope, receive, send)
        finally:
            deadline.cancel()
            self._cancel(self._job, ClientGoneError())

    async def _send_events(self, context: RequestContext, send: Send) -> None:
        try:
            await self._send_work(context, send)
        except UnfogError as error:
            await self._send_error(context, send, error)
        except Exception:
            log.exception("Event stream failed", extra={"request_id": context.request_id})
            await self._send_error(context, send, InternalError())

    async def _send_work(self, context: RequestContext, send: Send) -> None:
        job = self._job
        await send_part(send, self._format.accepted(job).encode())
        is_end = False
        while not is_end:
            events, is_end = await self._events.get()
            texts = [await self._encoded(context, event) for event in events]
            if is_end and not job.future.exception():
                texts.append(self._format.done(job))
            await send_part(send, "".join(texts).encode())
        job.future.result()  # raises the error of a failed job

    async def _encoded(self, context: RequestContext, event: Progress | ImageDone) -> str:
        with context.encoding(self._metrics):
            return self._encode(event) if self._is_small(event) else await asyncio.to_thread(self._encode, event)

    def _is_small(self, event: Progress | ImageDone) -> bool:
        """Returns True if the event is encoded in less time than a thread needs to start."""
        if isinstance(event, ImageDone):
            return self._format.image_scale == 1 and event.pixels.size <= MAX_SMALL_PIXELS
        images, scale = (*event.previews, *(event.x_t or ())), self._format.preview_scale
        is_small = sum(image.size for image in images) * scale**2 <= MAX_SMALL_PIXELS
        return is_small and len(images) * scale**2 <= MAX_SMALL_IMAGES

    def _encode(self, event: Progress | ImageDone) -> str:
        return self._format.progress(event) if isinstance(event, Progress) else self._format.image(event)

    async def _send_error(self, context: RequestContext, send: Send, error: UnfogError) -> None:
        context.outcome = error.code
        self._metrics.count_rejection(error)
        await send_part(send, self._format.error(error, context.request_id).encode())


async def send_part(send: Send, content: bytes) -> None:
    """Sends a part of the body, unless it is empty."""
    if content:
        await send({"type": "http.response.body", "body": content, "more_body": True})
