"""Builds the application from its settings, engine, routes and middleware."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI

from app import VERSION, errors
from app.api import docs, page
from app.api.http.paths import ExactRoutes, Paths
from app.api.http.problems import handle_errors
from app.api.http.uploads import ImageReader
from app.api.inference import routes as inference
from app.api.line_requests import LineRequests
from app.api.middleware.access_log import AccessLog
from app.api.middleware.auth import Auth
from app.api.middleware.cors import CORS, REQUEST_HEADERS, RESPONSE_HEADERS
from app.api.middleware.head import HeadAsGet
from app.api.middleware.request_context import RequestContextMiddleware
from app.api.middleware.security_headers import SecurityHeaders
from app.api.middleware.tracing import Traces
from app.api.middleware.unread_body import UnreadBody
from app.api.native import (
    archives,
    batch,
    denoise,
    edit,
    generate,
    inpaint,
    models,
    monitoring,
    recognize,
    reproduce,
    score,
)
from app.api.native.batch import BatchViewers
from app.api.openai import batches, files
from app.api.openai import images as openai
from app.api.openai import models as openai_models
from app.api.openapi import add_openapi
from app.api.service import Service
from app.batches.batches import Batches
from app.batches.database import Database
from app.batches.files import Files, Limits
from app.batches.rates import Rates
from app.batches.records import Line, LineAnswer
from app.batches.runner import BatchRunner
from app.batches.service import BatchService
from app.batches.webhooks import WebhookSender, WebhookTargets
from app.engine.engine import Engine, EngineState
from app.engine.interface import StepRunner
from app.engine.step_loop import StepLoop
from app.logs import num_lines_dropped
from app.metrics import Metrics
from app.runner.load import load_runner
from app.settings import Settings
from app.tasks.score import read_real_digits

# The routes of these routers compute images or recognise digits.
WORK_ROUTERS = (
    generate.router,
    recognize.router,
    denoise.router,
    inpaint.router,
    edit.router,
    reproduce.router,
    score.router,
    openai.router,
    inference.router,
)
# The routes of these routers can be named in the lines of a batch.
LINE_ROUTERS = (
    generate.router,
    recognize.router,
    denoise.router,
    inpaint.router,
    edit.router,
    reproduce.router,
    openai.router,
)
READ_ROUTERS = (models.router, batch.router, openai_models.router)
BATCH_ROUTERS = (files.router, batches.router, archives.router)
PROBE_ROUTERS = (monitoring.router, inference.open_router)  # their routes need no API key
DAY_SECONDS = 24 * 3600
STOP_SECONDS = 5.0  # time limit for the step that is running at shutdown


def create_app(settings: Settings, load: Callable[[], StepRunner] | None = None) -> FastAPI:
    """Returns the ASGI application. `load` creates the runner. The default is `load_runner(settings)`.

    Raises DatabaseError if the settings of the database cannot be used.
    """
    meters = Metrics()
    engine = Engine(
        capacity=settings.queue_capacity,
        max_batch=settings.max_batch,
        watchdog_seconds=settings.watchdog_seconds,
        metrics=meters,
    )
    service = Service(settings, engine, meters, time.monotonic(), ImageReader(settings), _batch_service(settings))
    lines = LineRequests(service, LINE_ROUTERS)
    loop = StepLoop(engine, load or (lambda: load_runner(settings)), meters, service.mailbox.deliver)
    traces = Traces() if settings.traces == "on" else None
    _watch(engine, meters)
    engine.ready.add_done_callback(lambda _: service.clip.open(engine.clip, read_real_digits()))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loop.start()
        _start_batches(service, lines)
        try:
            yield
        finally:
            await _stop(service, loop, traces)

    app = FastAPI(
        title="unfog",
        version=VERSION,
        lifespan=lifespan,
        redirect_slashes=False,
        openapi_url="/openapi.json" if settings.docs == "on" else None,
        docs_url=None,  # FastAPI's page loads scripts from a CDN. api/docs.py replaces it.
        redoc_url=None,
    )
    app.state.service, app.state.lines, app.state.viewers = service, lines, BatchViewers(engine)
    routers: list[APIRouter] = [*PROBE_ROUTERS, *WORK_ROUTERS, *READ_ROUTERS, *BATCH_ROUTERS]
    web_pages = list[str]()
    probes = [route for router in PROBE_ROUTERS for route in router.routes]
    open_routes, open_files = [*app.routes, *probes], frozenset[str]()  # app.routes: /openapi.json
    if settings.docs == "on":
        routers.append(docs.router)
        open_routes += docs.router.routes
        web_pages.append(docs.PAGE_PATH)
    if settings.page == "on":
        routers.append(page.router)
        open_files = page.OPEN_PATHS
        web_pages.append(page.PAGE_PATH)
    paths = Paths(app.routes, *(router.routes for router in routers))
    # include_router would match the path of each request with the routes of each router, and then again.
    app.router.routes.extend(route for router in routers for route in router.routes)
    app.router.routes.insert(0, ExactRoutes(app.router.routes))
    handle_errors(app, meters)
    declared = (*WORK_ROUTERS, *READ_ROUTERS, *BATCH_ROUTERS, *PROBE_ROUTERS)
    add_openapi(app, service, [each for router in declared for each in router.operations])
    access_log = AccessLog(meters, traces, paths=paths, quiet=Paths(probes))
    _add_middleware(app, settings, meters, access_log, Paths(open_routes, exact=open_files))
    app.add_middleware(SecurityHeaders, pages=web_pages)
    return app


async def _stop(service: Service, loop: StepLoop, traces: Traces | None) -> None:
    """Ends all threads and the CLIP process. Unfinished requests are answered with 503."""
    engine = service.engine
    engine.drain()
    await service.batches.stop()
    service.give_up(errors.Draining(1))
    service.pictures.close()
    service.animations.close()
    await asyncio.to_thread(loop.stop, STOP_SECONDS)
    await asyncio.to_thread(service.clip.join, STOP_SECONDS)
    if engine.clip:  # If the engine became ready during the shutdown, service.clip did not know the model.
        engine.clip.close()
    if traces:
        await asyncio.to_thread(traces.close)


def _add_middleware(
    app: FastAPI, settings: Settings, meters: Metrics, access_log: AccessLog, open_paths: Paths
) -> None:
    """Adds the middleware, innermost first. CORS is outside auth, so that web pages can read auth errors."""
    app.add_middleware(
        Auth,
        keys=settings.api_keys,
        rates=settings.rate_limit,
        metrics=meters,
        open_paths=open_paths,
        rate_limit_url=settings.rate_limit_url,
    )
    if settings.cors_origins:
        app.add_middleware(
            CORS,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=REQUEST_HEADERS,
            expose_headers=RESPONSE_HEADERS,
        )
    app.add_middleware(HeadAsGet)
    app.add_middleware(RequestContextMiddleware, metrics=meters, access_log=access_log)
    app.add_middleware(UnreadBody)


def _batch_service(settings: Settings) -> BatchService:
    """Returns the service of files and batches."""
    url = settings.database_url
    database = Database(settings.data_dir, url.get_secret_value() if url else None)
    limits = Limits(
        settings.max_files,
        settings.max_file_bytes,
        settings.max_stored_bytes,
        settings.max_lines,
        settings.file_days * DAY_SECONDS,
    )
    endpoints, targets = LineRequests.endpoints_of(LINE_ROUTERS), _webhook_targets(settings)
    batches_of_all = Batches(database, limits, endpoints, targets.check, Rates())
    return BatchService(database, Files(database, limits), batches_of_all)


def _start_batches(service: Service, lines: LineRequests) -> None:
    """Starts what answers the lines of batches and sends their webhooks."""
    settings, batch_service = service.settings, service.batches
    database, stored, secret = batch_service.database, batch_service.batches, settings.webhook_secret
    sender = WebhookSender(database, _webhook_targets(settings), secret.get_secret_value() if secret else None)
    engine, meters = service.engine, service.metrics

    async def answer(line: Line) -> LineAnswer:
        """Answers a line. Waits for the engine, because a refused line would be tried again only seconds later."""
        if not engine.ready.done():
            ready = asyncio.wrap_future(engine.ready)
            ready.add_done_callback(lambda each: each.cancelled() or each.exception())  # The server reports it.
            await asyncio.wait((ready,))
        return await lines.answer(line)

    runner = BatchRunner(
        database, stored, answer, engine.full_step, lambda: engine.alive, stored.rates, meters, sender.wake
    )
    batch_service.start(runner, sender)


def _webhook_targets(settings: Settings) -> WebhookTargets:
    may_be_private, has_secret = settings.webhook_private == "on", settings.webhook_secret is not None
    return WebhookTargets(settings.webhook_hosts, may_be_private, has_secret)


def _watch(engine: Engine, meters: Metrics) -> None:
    """Connects the gauges to the engine. Each scrape reads the current state."""
    meters.queue_depth.set_function(lambda: engine.count_images().waiting)
    meters.queue_capacity.set(engine.capacity)
    meters.running_images.set_function(lambda: engine.count_images().running)
    meters.ready.set_function(lambda: engine.apparent_state is EngineState.OK)
    meters.alive.set_function(lambda: engine.alive)
    meters.watch_dropped_log_lines(num_lines_dropped)
    # Start these series at 0: PromQL's rate() ignores the first value of a new series.
    for route in Paths(*(router.routes for router in WORK_ROUTERS)).templates:
        for code in ("200", "429", "500", "503", "504"):
            meters.requests.labels(route, code)
    for result in ("completed", "failed"):
        meters.batch_lines.labels(result)

    def publish_models(ready: "Future[None]") -> None:
        if not ready.exception():
            for info in engine.models.values():
                meters.model_info.labels(info.name, info.sha256, info.device, info.dtype, info.version).set(1)
            if engine.device_memory:
                meters.watch_device_memory(engine.device_memory)

    engine.ready.add_done_callback(publish_models)
