"""A replica of the service under Ray Serve: `serve deploy deploy/ray/serve.yaml`. deploy/ray/README.md describes it.

The application is built in the process of the replica, because it has threads and a model. It is the same application
as without Ray. The differences are:

    start        the replica gets requests only when the engine is ready
    drain        Ray stops sending requests, and waits for those that the replica has
    metrics      `/metrics` has those of all replicas, with the label `replica`, because Ray's proxy chooses a replica
    compute      one thread for each CPU that Ray has reserved, because Ray sets OMP_NUM_THREADS to this number
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, Metric
from ray import serve
from ray.serve.config import BackpressureConfig
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from app.api.service import Service
from app.logs import configure_logging, start_log
from app.main import create_app
from app.ray.metrics import merged
from app.server.server import announce, drain, exempt_from_collection
from app.settings import Settings, load_settings
from model.compiled.memory import keep_freed_memory, limit_primitives

log = logging.getLogger("unfog")

SCRAPE_SECONDS = 5.0  # limit for collecting the metrics of all replicas; Prometheus waits 10 s


class Replica:
    """The deployment. Ray calls the methods."""

    def __init__(self) -> None:
        self._settings = load_settings({})
        configure_logging(self._settings.log_format, self._settings.log_level, start_log())
        keep_freed_memory()
        limit_primitives()
        context = serve.get_replica_context()
        self._tag = context.replica_tag
        self._replicas = serve.get_deployment_handle(context.deployment, context.app_name)
        self._app = create_app(self._settings)
        self._service: Service = self._app.state.service
        if not self._service.batches.database.is_shared:
            log.warning("Files and batches need UNFOG_DATABASE_URL, because each replica would have its own")

    def __serve_build_asgi_app__(self) -> ASGIApp:
        self._app.router.routes.insert(0, Route("/metrics", self._metrics_of_all))
        _wait_for_engine(self._app, self._settings, self._tag)
        if trusted := self._settings.trusted_proxies:
            return cast(ASGIApp, ProxyHeadersMiddleware(cast(Any, self._app), ",".join(trusted)))
        return self._app

    def check_health(self) -> None:
        """Raises RuntimeError if the engine has failed or is stuck. Ray then replaces the replica."""
        if not self._service.engine.alive:
            raise RuntimeError("the engine has failed or is stuck")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Returns the number of images that wait or run, without those of batches, which need no further replicas."""
        return {"images": float(self._service.engine.num_interactive())}

    def metrics(self) -> tuple[str, list[Metric]]:
        """Returns the name of this replica and its metrics."""
        return self._tag, list(self._service.metrics.registry.collect())

    async def _metrics_of_all(self, request: Request) -> Response:
        """Returns the metrics of all replicas. A replica that does not answer is missing."""
        answers = await self._replicas.broadcast("metrics").results_async(
            timeout_s=SCRAPE_SECONDS, return_exceptions=True
        )
        found = dict(answer for answer in answers if not isinstance(answer, BaseException))
        return Response(await asyncio.to_thread(merged, found), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _wait_for_engine(app: FastAPI, settings: Settings, replica: str) -> None:
    """Makes the lifespan of the application start when the engine is ready, and drain before it ends."""
    service: Service = app.state.service
    without_engine = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with without_engine(app):
            try:
                await asyncio.wrap_future(service.engine.ready)
            except Exception as error:
                log.critical("The engine failed to start: %s", error)
                raise
            exempt_from_collection()
            announce(service.engine, settings, replica=replica)
            yield
            await drain(service, settings.drain_timeout)

    app.router.lifespan_context = lifespan


_deployment = serve.deployment(
    max_ongoing_requests=1024,  # The admission of the service decides, because it knows the number of images.
    max_queued_requests=256,  # in each proxy, while no replica accepts requests
    backpressure_config=BackpressureConfig(status_code=429, retry_after_s=5),
    max_surge_percent=100,  # Ray starts new replicas before it stops old ones.
    graceful_shutdown_timeout_s=40,  # UNFOG_DRAIN_TIMEOUT 25 s + last answers 5 s + exit 5 s + margin 5 s
    graceful_shutdown_wait_loop_s=0.5,
)
application = _deployment(serve.ingress()(Replica)).bind()
