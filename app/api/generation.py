"""Generation: turns a request into a job and waits for its images. Also defines what the routes share."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from app import errors
from app.api.context import RequestContext
from app.api.images import provenance_of
from app.api.requests import ClientGoneError, unless_gone
from app.api.schemas import GenerateRequest
from app.engine.engine import Engine
from app.engine.interface import ModelInfo
from app.engine.job import Job, JobRequest, Listener, Options, Pixels
from app.metrics import Metrics
from app.settings import Settings
from model.png import Provenance


class InFlight:
    """Counts requests in flight: from their admission until the answer is sent or the client is gone.

    Only the event loop may use it.
    """

    def __init__(self) -> None:
        self._count = 0
        self._none = asyncio.Event()
        self._none.set()

    @contextmanager
    def one(self) -> Iterator[None]:
        """Counts one request within the block."""
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
    """The objects of one running service, which its routes use."""

    settings: Settings
    engine: Engine
    metrics: Metrics
    started_at: float
    in_flight: InFlight = field(default_factory=InFlight)

    @property
    def uptime_seconds(self) -> float:
        """Returns the seconds since the application was made."""
        return time.monotonic() - self.started_at

    def info(self, model: str) -> ModelInfo:
        """Returns the model of this name; InvalidRequest if there is none, Starting or EngineFailed if not loaded."""
        models = self.engine.models
        if not models:
            self.engine.state.refuse_unless_ok()
            raise errors.Starting(1)
        if model not in models:
            names = " or ".join(f"'{name}'" for name in models)
            raise errors.InvalidRequest.of("model", f"Input should be {names}")
        return models[model]

    def submit(
        self, body: GenerateRequest, context: RequestContext, num_previews: int = 0, listener: Listener | None = None
    ) -> Job:
        """Admits a request and returns its job; InvalidRequest if it is never possible, Overloaded if not now.

        The request is in flight from now on.
        """
        self._check(body)
        info = self.info(body.model)
        options = self._options(body, info)
        job = Job(
            JobRequest(
                options,
                body.count,
                self.settings.request_timeout if body.timeout_seconds is None else body.timeout_seconds,
                num_previews,
                listener,
                info.guided_steps_of(options),
                context.request_id,
            )
        )
        self.engine.submit(job)
        context.job = job
        context.answered.enter_context(self.in_flight.one())
        return job

    def provenance(self, job: Job) -> Provenance:
        """Returns the provenance that the PNGs of a job contain."""
        options = job.request.options
        return provenance_of(options, self.info(options.model).sha256)

    def _options(self, body: GenerateRequest, info: ModelInfo) -> Options:
        """Returns the options, with the checkpoint's defaults; InvalidRequest if the checkpoint cannot draw them."""
        sampler = body.sampler or info.samplers[0]
        if sampler not in info.samplers:
            raise errors.InvalidRequest.of("sampler", f"Input should be one of {', '.join(info.samplers)}")
        options = Options(
            digit=body.digit,
            seed=body.seed,
            num_steps=body.num_steps or info.default_steps,
            sampler=sampler,
            guidance_scale=body.guidance_scale or info.guidance_scale[sampler],
            model=info.name,
        )
        if options.digit >= info.num_classes:
            raise errors.InvalidRequest.of("digit", f"Input should be less than {info.num_classes}")
        if options.num_steps > info.max_steps:
            raise errors.InvalidRequest.of("num_steps", f"Input should be less than or equal to {info.max_steps}")
        if info.steps and options.num_steps not in info.steps:
            permitted = " or ".join(map(str, info.steps))
            raise errors.InvalidRequest.of("num_steps", f"Input should be {permitted} for model '{info.name}'")
        if options.guidance_scale != 1 and not info.guidable:
            raise errors.InvalidRequest.of("guidance_scale", "Input should be 1: this checkpoint cannot be guided")
        return options

    def _check(self, body: GenerateRequest) -> None:
        """Raises InvalidRequest if the request exceeds a limit of the settings."""
        limit = self.settings.largest_request
        if body.count > limit:
            raise errors.InvalidRequest.of("count", f"Input should be less than or equal to {limit}")
        longest = self.settings.request_timeout
        if body.timeout_seconds is not None and body.timeout_seconds > longest:
            raise errors.InvalidRequest.of("timeout_seconds", f"Input should be less than or equal to {longest:g}")


async def finish(service: Service, request: Request, job: Job) -> list[Pixels]:
    """Returns the images of a job; DeadlineExceeded after its timeout, ClientGoneError if the client disconnects.

    Cancels the job if it is not finished then.
    """
    try:
        async with asyncio.timeout(job.request.timeout):
            return await unless_gone(request, asyncio.wrap_future(job.future))
    except TimeoutError:
        raise errors.DeadlineExceeded from None
    finally:
        service.engine.cancel(job, ClientGoneError())


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDependency = Annotated[Service, Depends(_service)]
