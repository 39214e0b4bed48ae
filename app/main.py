"""The application: its routes, its errors, and the engine that lives as long as it does."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Route

from app import VERSION, errors
from app.config import Settings
from app.engine import Engine
from app.metrics import Metrics
from app.middleware import RequestContext, problem_response
from app.openapi import add_openapi
from app.routes import generate, health, metrics
from app.runner import Runner
from app.service import Service
from app.stepping import StepRunner

STOP_SECONDS = 5.0  # for a step in progress


def create_app(settings: Settings, load: Callable[[], StepRunner] | None = None) -> FastAPI:
    """The service as an ASGI application; `load` makes the runner, the settings' own by default."""
    meters = Metrics()
    engine = Engine(
        load or (lambda: Runner.load(settings)),
        capacity=settings.queue_capacity,
        max_batch=settings.max_batch,
        watchdog_seconds=settings.watchdog_seconds,
        metrics=meters,
    )
    service = Service(settings, engine, meters, time.monotonic())
    _watch(engine, meters)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.drain()
        engine.give_up(errors.Draining(1))
        await asyncio.to_thread(engine.stop, STOP_SECONDS)

    app = FastAPI(title="unfog", version=VERSION, lifespan=lifespan, redirect_slashes=False)
    app.state.service = service
    for module in (generate, health, metrics):
        app.include_router(module.router)
    _handle_errors(app, meters)
    add_openapi(app)
    plain_paths = frozenset(route.path for route in app.routes if isinstance(route, Route))  # /docs and its like
    app.add_middleware(RequestContext, metrics=meters, plain_paths=plain_paths)
    return app


def _watch(engine: Engine, meters: Metrics) -> None:
    """The gauges read the engine when they are scraped."""
    meters.queue_depth.set_function(lambda: engine.waiting)
    meters.queue_capacity.set(engine.capacity)
    meters.running_images.set_function(lambda: engine.running)
    meters.ready.set_function(lambda: engine.takes_work)

    def describe(ready: "Future[None]") -> None:
        if not ready.exception():
            for info in engine.models.values():
                meters.model_info.labels(info.name, info.sha256, info.device, info.dtype, info.version).set(1)
            if engine.device_memory:
                meters.watch_device_memory(engine.device_memory)

    engine.ready.add_done_callback(describe)


def _handle_errors(app: FastAPI, meters: Metrics) -> None:
    @app.exception_handler(errors.UnfogError)
    async def known(request: Request, error: errors.UnfogError) -> Response:
        meters.count_rejection(error)
        return problem_response(error, request.state.request_id)

    @app.exception_handler(HTTPException)
    async def routed(request: Request, error: HTTPException) -> Response:
        if error.status_code == 405:
            return problem_response(errors.MethodNotAllowed((error.headers or {})["Allow"]), request.state.request_id)
        return problem_response(errors.NotFound(), request.state.request_id)

    @app.exception_handler(RequestValidationError)
    async def wrong_query(request: Request, error: RequestValidationError) -> Response:
        wrong = [{"loc": list(item["loc"]), "msg": item["msg"]} for item in error.errors()]
        return problem_response(errors.InvalidRequest(wrong), request.state.request_id)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=generate.CLIENT_CLOSED_REQUEST)
