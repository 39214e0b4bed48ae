"""GET /events/batch: the running rows of all requests, as an event stream for the page.

One task asks the engine for a batch, encodes it and passes the text to all viewers. Then it pauses, which limits the
rate. A viewer keeps only the newest text, so a client that does not read uses a bounded amount of memory. Without
viewers there is no task, and the engine publishes nothing.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from fastapi import Request
from pydantic import BaseModel, Field
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.api.http.context import RequestContext, context_of
from app.api.http.events import EventResponse, event_text, send_part
from app.api.http.media_types import EVENTS
from app.api.http.negotiation import negotiate
from app.api.http.problems import error_response
from app.api.operations import READ_STATUSES, STATUS, Operation, Problem, Router, Stream
from app.engine.batch_feed import Batch
from app.engine.engine import Engine
from app.engine.job import GUIDED_EVALUATIONS, Trajectory
from app.errors import InternalError, NotAcceptable, Overloaded, UnfogError

router = Router()
log = logging.getLogger(__name__)

MAX_VIEWERS = 32
RETRY_SECONDS = 10  # Retry-After if there are too many viewers
PAUSE = partial(asyncio.sleep, 0.1)  # after each event, so that there are at most ten events a second
# The last event is repeated after this time without a new one. Otherwise a connection that was lost without a message
# would never be noticed.
REPEAT_SECONDS = 15.0
RECOGNISE = "recognise"  # the name of both processes that compare the classes without reverse steps
COMPARING = ("forward", "noisy")


class BatchRow(BaseModel):
    """An image that has started and is not finished, or a comparison of the classes of a picture."""

    job: int = Field(description="Number of the job, in the order of admission since the start of the service.")
    index: int = Field(description="Index of the image within its request.")
    step: int = Field(description="Number of finished steps.")
    of: int = Field(description="Number of steps of the image. A comparison of the classes can end earlier.")
    model: str
    sampler: str = Field(description="The sampler, or recognise for a comparison of the classes.")
    guided: bool = Field(description="True if the next step of the image has guidance.")
    evaluations: int = Field(description="Number of network evaluations in this step, 0 if it has none.")


class BatchEvent(BaseModel):
    """The running images of all requests at the beginning of a step."""

    step: int = Field(description="Number of the step since the start of the service.")
    waiting: int = Field(description="Number of images in the queue.")
    running: int = Field(description="Number of images between their first and last step.")
    rows: list[BatchRow] = Field(description="At most 256 rows. Empty if the service is idle.")


def encode_batch(batch: Batch) -> bytes:
    """Returns the event of a batch."""
    selected = set(batch.selected)
    rows = [_row(row, step, num_classes, row in selected) for row, step, num_classes in batch.rows]
    data = {"step": batch.step, "waiting": batch.waiting, "running": batch.running, "rows": rows}
    return event_text("batch", data).encode()


def _row(row: Trajectory, step: int, num_classes: int, is_selected: bool) -> dict[str, Any]:
    """Returns the fields of BatchRow. It uses no field of `row` that a later step changes."""
    request, options = row.job.request, row.options
    is_guided = not num_classes and step in request.guided_steps
    evaluations = num_classes or (GUIDED_EVALUATIONS if is_guided else 1)
    return {
        "job": row.job.number,
        "index": row.index,
        "step": step,
        "of": options.num_steps,
        "model": options.model,
        "sampler": RECOGNISE if options.sampler in COMPARING else options.sampler,
        "guided": is_guided,
        "evaluations": evaluations if is_selected else 0,
    }


class Viewer:
    """Keeps the newest event until it is sent."""

    def __init__(self) -> None:
        self._newest: bytes | None = None
        self._error: UnfogError | None = None
        self._changed = asyncio.Event()

    def put(self, event: bytes) -> None:
        """Replaces the event that is not sent yet."""
        self._newest = event
        self._changed.set()

    def end(self, error: UnfogError) -> None:
        """Makes `get` raise the error."""
        self._error = error
        self._changed.set()

    async def get(self) -> bytes:
        """Waits for an event that this viewer has not received. Raises the error at the end of the stream."""
        await self._changed.wait()
        self._changed.clear()
        if self._error:
            raise self._error
        assert self._newest is not None, "only put() and end() wake the viewer"
        return self._newest


class BatchViewers:
    """The viewers of the batch. It is not thread-safe: only the event loop may use it."""

    def __init__(self, engine: Engine, pause: Callable[[], Awaitable[None]] = PAUSE) -> None:
        """`pause` waits after each event. It limits the rate."""
        self._engine, self._feed, self._pause = engine, engine.feed, pause
        self._viewers: set[Viewer] = set()
        self._task: asyncio.Task[None] | None = None
        self._arrived: asyncio.Future[Batch] | None = None  # the batch that the task waits for
        # The number of the last step, if the engine was idle and all viewers received that batch; otherwise None.
        self._idle_step: int | None = None

    def __len__(self) -> int:
        return len(self._viewers)

    @contextmanager
    def watch(self) -> Iterator[Viewer]:
        """Adds a viewer for the duration of the block.

        Raises Starting, Draining or EngineFailed, or Overloaded if there are too many viewers.
        """
        # The receiver is set before the state is read. If the engine fails in between, the viewer receives the error.
        self._feed.receiver = partial(_pass_on, asyncio.get_running_loop(), self._receive)
        self._engine.apparent_state.refuse_unless_ok()
        if len(self._viewers) >= MAX_VIEWERS:
            raise Overloaded(RETRY_SECONDS, f"The stream has {MAX_VIEWERS} viewers, which is the limit")
        viewer = Viewer()
        self._viewers.add(viewer)
        self._idle_step = None
        self._publish_if_idle()
        self._task = self._task or asyncio.create_task(self._run())
        try:
            yield viewer
        finally:
            self._viewers.discard(viewer)
            if not self._viewers:
                self._stop()

    async def _run(self) -> None:
        try:
            await self._send_batches()
        except Exception:
            log.exception("Stream of batches failed")
            self._end(InternalError())

    async def _send_batches(self) -> None:
        event = b""
        while True:
            arrived = self._arrived = asyncio.get_running_loop().create_future()
            self._feed.is_wanted = True
            self._publish_if_idle()
            await asyncio.wait([arrived], timeout=REPEAT_SECONDS)  # does not lose a batch that arrives at the end
            if arrived.done():
                event = encode_batch(arrived.result())
            arrived.cancel()
            if event:
                for viewer in self._viewers:
                    viewer.put(event)
            await self._pause()

    def _publish_if_idle(self) -> None:
        """Publishes a batch without rows if the engine is idle and a viewer does not know it.

        An idle engine runs no step that could publish. `is_wanted` is set before the engine looks for jobs here, and
        the engine reads it again after it has removed the last job. So one of them publishes.
        """
        if self._engine.num_steps != self._idle_step:
            self._engine.publish_if_idle()

    def _receive(self, message: Batch | UnfogError) -> None:
        if isinstance(message, UnfogError):
            self._end(message)
        elif self._arrived and not self._arrived.done():
            self._idle_step = None if message.rows or message.waiting else message.step
            self._arrived.set_result(message)

    def _end(self, error: UnfogError) -> None:
        for viewer in self._viewers:
            viewer.end(error)
        self._stop()

    def _stop(self) -> None:
        self._feed.is_wanted = False
        if self._task:
            self._task.cancel()
        self._task = self._arrived = None


def _pass_on(
    loop: asyncio.AbstractEventLoop, receive: Callable[[Batch | UnfogError], None], message: Batch | UnfogError
) -> None:
    """Calls `receive` in the event loop. Any thread may call it. Does nothing if the event loop is closed."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(receive, message)


class BatchStream(EventResponse):
    """Sends the events of a viewer until the client disconnects, or until the service stops."""

    def __init__(self, viewer: Viewer) -> None:
        super().__init__()
        self._viewer = viewer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context_of(scope).may_abort = True
        await super().__call__(scope, receive, send)

    async def _send_events(self, context: RequestContext, send: Send) -> None:
        try:
            while True:
                await send_part(send, await self._viewer.get())
        except UnfogError as error:
            context.outcome = error.code
            await send_part(send, event_text("error", error.problem(context.request_id)).encode())


EXAMPLE = {
    "step": 1729,
    "waiting": 3,
    "running": 2,
    "rows": [
        {
            "job": 12,
            "index": 0,
            "step": 40,
            "of": 100,
            "model": "default",
            "sampler": "ddpm",
            "guided": True,
            "evaluations": 2,
        },
        {
            "job": 13,
            "index": 0,
            "step": 1,
            "of": 4,
            "model": "fast",
            "sampler": "ddim",
            "guided": False,
            "evaluations": 1,
        },
    ],
}
STREAM = Stream(
    "BatchStreamEvent", "of a stream of batches: batch events, then error.", {"batch": BatchEvent, "error": Problem}
)


@router.operation(
    Operation(
        path="/events/batch",
        name="watch_batch",
        group="Operations",
        summary="Watch the running images",
        description="the running images",
        formats={EVENTS: STREAM.content(event_text("batch", EXAMPLE))},
        stream=STREAM,
        statuses={
            **READ_STATUSES,
            406: STATUS[406],
            429: "overloaded (there are 32 viewers) or rate_limited, with Retry-After",
        },
        errors=[NotAcceptable((EVENTS,))],
    )
)
async def batch(request: Request) -> Response:
    """Sends the running images of all requests, at most ten times a second, until the client disconnects."""
    negotiate(request, (EVENTS,))
    viewers: BatchViewers = request.app.state.viewers
    context = context_of(request.scope)
    try:
        viewer = context.answered.enter_context(viewers.watch())
    except Overloaded as error:  # It is not counted as a rejected request, because the queue can have room for images.
        return error_response(error, request.scope)
    return BatchStream(viewer)
