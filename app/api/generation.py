"""Turns a request into a job and waits for its images. Also defines the service object that the routes share."""

import asyncio
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from app import errors
from app.api.context import RequestContext
from app.api.images import provenance_of
from app.api.requests import ClientGoneError, cancel_on_disconnect
from app.api.schemas import GenerateRequest
from app.engine.engine import Engine
from app.engine.interface import ModelInfo
from app.engine.job import Job, JobRequest, Listener, Options, Pixels
from app.metrics import Metrics
from app.settings import Settings
from model.png import Provenance


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
            raise errors.InvalidRequest.of("model", f"Input should be {_either(models)}")
        return models[model]

    def submit(
        self, body: GenerateRequest, context: RequestContext, num_previews: int = 0, listener: Listener | None = None
    ) -> Job:
        """Submits a request to the engine and returns the job. The request is then in flight.

        Raises InvalidRequest if the model or a limit does not permit it, and Overloaded if it is not admitted now.
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
        """Returns the provenance for the PNG files of a job."""
        options = job.request.options
        return provenance_of(options, self.info(options.model).sha256)

    def _options(self, body: GenerateRequest, info: ModelInfo) -> Options:
        """Adds the model's defaults. Raises InvalidRequest for a value that the model does not support."""
        sampler = body.sampler or info.samplers[0]
        if sampler not in info.samplers:
            raise _unsupported("sampler", _either(info.samplers), info)
        options = Options(
            digit=body.digit,
            seed=body.seed,
            num_steps=body.num_steps or info.default_steps,
            sampler=sampler,
            guidance_scale=body.guidance_scale or info.guidance_scale[sampler],
            model=info.name,
        )
        if options.digit >= info.num_classes:
            raise _unsupported("digit", f"less than or equal to {info.num_classes - 1}", info)
        if options.num_steps > info.max_steps:
            raise _unsupported("num_steps", f"less than or equal to {info.max_steps}", info)
        if info.steps and options.num_steps not in info.steps:
            raise _unsupported("num_steps", " or ".join(map(str, info.steps)), info)
        if options.guidance_scale != 1 and not info.guidable:
            raise _unsupported("guidance_scale", "1 (no guidance)", info)
        return options

    def _check(self, body: GenerateRequest) -> None:
        """Raises InvalidRequest if the request exceeds a limit in the settings."""
        limit = self.settings.largest_request
        if body.count > limit:
            raise errors.InvalidRequest.of("count", f"Input should be less than or equal to {limit}")
        longest = self.settings.request_timeout
        if body.timeout_seconds is not None and body.timeout_seconds > longest:
            raise errors.InvalidRequest.of("timeout_seconds", f"Input should be less than or equal to {longest:g}")


async def finish(service: Service, request: Request, job: Job) -> list[Pixels]:
    """Waits for the images of a job. Raises DeadlineExceeded after its timeout, ClientGoneError after a disconnect.

    In both cases, cancels the job.
    """
    try:
        async with asyncio.timeout(job.request.timeout):
            return await cancel_on_disconnect(request, asyncio.wrap_future(job.future))
    except TimeoutError:
        raise errors.DeadlineExceeded from None
    finally:
        service.engine.cancel(job, ClientGoneError())


def _unsupported(field: str, supported: str, info: ModelInfo) -> errors.InvalidRequest:
    return errors.InvalidRequest.of(field, f"Input should be {supported} for model '{info.name}'")


def _either(values: Iterable[str]) -> str:
    return " or ".join(f"'{value}'" for value in values)


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDependency = Annotated[Service, Depends(_service)]
