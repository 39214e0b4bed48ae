"""What the routes share: the settings, the engine, the metrics, and how a request becomes a finished job."""

import asyncio
import time
from dataclasses import dataclass, field

from fastapi import Request

from app import errors
from app.api.context import Notes
from app.api.images import provenance_of
from app.api.owed import Owed
from app.api.requests import ClientGoneError, unless_gone
from app.api.schemas import GenerateRequest, Timing
from app.engine.engine import Engine
from app.engine.job import Job, Listener, Options, Pixels
from app.metrics import Metrics
from app.runner.loaded_model import ModelInfo
from app.settings import Settings
from model.png import Provenance


@dataclass(frozen=True, slots=True)
class Service:
    """One running service."""

    settings: Settings
    engine: Engine
    metrics: Metrics
    started_at: float
    owed: Owed = field(default_factory=Owed)

    @property
    def uptime_seconds(self) -> float:
        """Since the application was made."""
        return time.monotonic() - self.started_at

    def info(self, model: str) -> ModelInfo:
        """What is served under that name; InvalidRequest where nothing is, Starting or EngineFailed too early."""
        models = self.engine.models
        if not models:
            self.engine.state.refuse_unless_ok()
            raise errors.Starting(1)
        if model not in models:
            names = " or ".join(f"'{name}'" for name in models)
            raise errors.InvalidRequest.of("model", f"Input should be {names}")
        return models[model]

    def submit(
        self, body: GenerateRequest, notes: Notes, num_previews: int = 0, listener: Listener | None = None
    ) -> Job:
        """Admits what is asked for; InvalidRequest for what can never be drawn, Overloaded for what cannot now.

        From here on an answer is owed.
        """
        self._check(body)
        info = self.info(body.model)
        options = self._options(body, info)
        timeout = body.timeout_seconds if body.given("timeout_seconds") else self.settings.request_timeout
        job = Job(options, body.count, timeout, num_previews, listener, info.guided_steps_of(options), notes.request_id)
        self.engine.submit(job)
        notes.job = job
        notes.answered.enter_context(self.owed.one())
        return job

    def provenance(self, job: Job) -> Provenance:
        """What goes into the job's files."""
        return provenance_of(job.options, self.info(job.options.model).sha256)

    def _options(self, body: GenerateRequest, info: ModelInfo) -> Options:
        """What is asked for, the checkpoint's own where it is not; InvalidRequest for what it cannot draw."""
        sampler = body.sampler if body.given("sampler") else info.samplers[0]
        if sampler not in info.samplers:
            raise errors.InvalidRequest.of("sampler", f"Input should be one of {', '.join(info.samplers)}")
        options = Options(
            digit=body.digit,
            seed=body.seed,
            num_steps=body.num_steps if body.given("num_steps") else info.default_steps,
            sampler=sampler,
            guidance_scale=body.guidance_scale if body.given("guidance_scale") else info.guidance_scale[sampler],
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
        """What the settings tell."""
        limit = self.settings.largest_request
        if body.count > limit:
            raise errors.InvalidRequest.of("count", f"Input should be less than or equal to {limit}")
        longest = self.settings.request_timeout
        if body.given("timeout_seconds") and body.timeout_seconds > longest:
            raise errors.InvalidRequest.of("timeout_seconds", f"Input should be less than or equal to {longest:g}")


async def finish(service: Service, request: Request, job: Job) -> list[Pixels]:
    """The job's images; DeadlineExceeded when the time is over, ClientGoneError when the client is.

    However this ends, the job's rows do not outlive it.
    """
    try:
        async with asyncio.timeout(job.timeout):
            return await unless_gone(request, asyncio.wrap_future(job.future))
    except TimeoutError:
        raise errors.DeadlineExceeded from None
    finally:
        service.engine.cancel(job, ClientGoneError())


def timing(job: Job) -> Timing:
    """Where a finished job's time went; total until now."""
    started, finished = job.started_at or job.submitted_at, job.finished_at or job.submitted_at
    return Timing(
        queue_seconds=round(started - job.submitted_at, 6),
        denoise_seconds=round(finished - started, 6),
        total_seconds=round(time.monotonic() - job.submitted_at, 6),
    )
