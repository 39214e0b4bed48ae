"""Health and metrics: /health for people, /livez, /readyz and /startupz for orchestrators, /metrics for Prometheus."""

from typing import Literal

from fastapi import Request
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from app import VERSION
from app.api.http.media_types import TEXT
from app.api.http.probes import probe_response
from app.api.native.examples import SHA256
from app.api.native.schemas import ModelName
from app.api.operations import Operation, Router, Schema, unavailable
from app.api.service import ServiceDependency
from app.engine.engine import EngineState

router = Router()


class HealthModel(ModelName):
    """A served model."""

    num_parameters: int


class Queue(BaseModel):
    """Images before their first step, images between their first and last step, and the maximum of waiting images."""

    waiting: int
    running: int
    capacity: int


class Health(BaseModel):
    """The state of the service. The fields model, models, device, dtype and compiled are absent during the start."""

    status: Literal["ok", "starting", "draining", "failed"]
    version: str
    model: HealthModel | None = None  # the default model
    models: list[HealthModel] | None = None
    device: str | None = None
    dtype: str | None = None
    compiled: bool | None = None  # True if the denoising step of every model is compiled
    queue: Queue
    uptime_seconds: float


class Liveness(BaseModel):
    """`alive` is false if the engine has failed or is stuck. The process must then be restarted."""

    alive: bool


class Readiness(BaseModel):
    """`ready` is true if new requests are accepted."""

    ready: bool


QUEUE = {"waiting": 0, "running": 0, "capacity": 1024}
MODEL = {"name": "default", "sha256": SHA256, "num_parameters": 2_703_684}
HEALTHY = {
    "status": "ok",
    "version": VERSION,
    "model": MODEL,
    "models": [MODEL],
    "device": "cpu",
    "dtype": "bfloat16",
    "compiled": True,
    "queue": QUEUE,
    "uptime_seconds": 86400.25,
}
STARTING = {"status": "starting", "version": VERSION, "queue": QUEUE, "uptime_seconds": 1.5}
METRICS = (
    "# HELP unfog_ready 1 if new requests are accepted, otherwise 0.\n# TYPE unfog_ready gauge\nunfog_ready 1.0\n"
    "# HELP unfog_requests_total HTTP requests completed, by route and status code.\n"
    "# TYPE unfog_requests_total counter\n"
    'unfog_requests_total{code="200",route="/generate"} 42.0\n'
)


def _probe(path: str, name: str, summary: str, answer: type[BaseModel], good: Schema, bad: Schema) -> Operation:
    """Returns the operation of a probe. `good` and `bad` are its answers with the statuses 200 and 503."""
    return Operation(
        path=path,
        name=name,
        group="Operations",
        summary=summary,
        answer=answer,
        example=good,
        others=unavailable(answer, bad),
    )


@router.operation(_probe("/health", "get_health", "Get the state of the service", Health, HEALTHY, STARTING))
async def health(request: Request, service: ServiceDependency) -> JSONResponse:
    """Returns the state of the service, with status 200 if it accepts requests, otherwise 503.

    Needs no API key and does not count against the rate limit.
    """
    engine = service.engine
    infos = list(engine.models.values())
    models = [HealthModel(name=i.name, sha256=i.sha256, num_parameters=i.num_parameters) for i in infos]
    state = engine.apparent_state
    answer = Health(
        status=state.value,
        version=VERSION,
        model=models[0] if models else None,
        models=models or None,
        device=infos[0].device if infos else None,
        dtype=infos[0].dtype if infos else None,
        compiled=all(i.compiled for i in infos) if infos else None,
        queue=Queue(**engine.count_images()._asdict(), capacity=engine.capacity),
        uptime_seconds=round(service.uptime_seconds, 3),
    )
    return probe_response(request, service.engine, answer.model_dump(exclude_none=True), state is EngineState.OK)


@router.operation(
    _probe(
        "/livez",
        "get_livez",
        "Check whether the process must be restarted",
        Liveness,
        {"alive": True},
        {"alive": False},
    )
)
async def livez(request: Request, service: ServiceDependency) -> JSONResponse:
    """Returns 200 under any load, but 503 if the engine has failed or is stuck. The process must then be restarted.

    Needs no API key and does not count against the rate limit.
    """
    return probe_response(request, service.engine, {"alive": service.engine.alive}, service.engine.alive)


READY, NOT_READY = {"ready": True}, {"ready": False}


@router.operation(_probe("/readyz", "get_readyz", "Check whether requests are accepted", Readiness, READY, NOT_READY))
@router.operation(
    _probe("/startupz", "get_startupz", "Check whether the start is complete", Readiness, READY, NOT_READY)
)
async def readyz(request: Request, service: ServiceDependency) -> JSONResponse:
    """Returns 200 if the checkpoints are loaded and warmed up and the service is not shutting down, otherwise 503.

    Needs no API key and does not count against the rate limit.
    """
    ready = service.engine.apparent_state is EngineState.OK
    return probe_response(request, service.engine, {"ready": ready}, ready)


@router.operation(
    Operation(
        path="/metrics",
        name="get_metrics",
        group="Operations",
        summary="Get the metrics for Prometheus",
        formats={TEXT: {"schema": {"type": "string"}, "example": METRICS}},
    )
)
async def metrics(service: ServiceDependency) -> Response:
    """Returns all metrics in the Prometheus text format.

    Needs no API key and does not count against the rate limit.
    """
    return Response(service.metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})
