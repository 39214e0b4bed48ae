"""Health and metrics: /health for people, /livez, /readyz and /startupz for orchestrators, /metrics for Prometheus."""

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from app import VERSION
from app.api.generation import ServiceDependency
from app.api.probes import probe_response
from app.api.schemas import Health, HealthModel, Liveness, Queue, Readiness
from app.engine.engine import EngineState

router = APIRouter()


@router.get("/health", operation_id="get_health", response_model=Health, responses={503: {"model": Health}})
async def health(request: Request, service: ServiceDependency) -> JSONResponse:
    """Returns the state of the service, with status 200 if it accepts requests, otherwise 503.

    Needs no API key and does not count against the rate limit.
    """
    engine, backlog = service.engine, service.engine.backlog
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
        queue=Queue(waiting=backlog.waiting, running=backlog.running, capacity=backlog.capacity),
        uptime_seconds=round(service.uptime_seconds, 3),
    )
    return probe_response(request, service.engine, answer.model_dump(exclude_none=True), state is EngineState.OK)


@router.get("/livez", operation_id="get_livez", response_model=Liveness, responses={503: {"model": Liveness}})
async def livez(request: Request, service: ServiceDependency) -> JSONResponse:
    """Returns 200 unless the engine has failed or is stuck. Then the process must be restarted. Load has no effect.

    Needs no API key and does not count against the rate limit.
    """
    return probe_response(request, service.engine, {"alive": service.engine.alive}, service.engine.alive)


@router.get("/readyz", operation_id="get_readyz", response_model=Readiness, responses={503: {"model": Readiness}})
@router.get(
    "/startupz",
    operation_id="get_startupz",
    response_model=Readiness,
    responses={503: {"model": Readiness}},
)
async def readyz(request: Request, service: ServiceDependency) -> JSONResponse:
    """Returns 200 if the checkpoints are loaded and warmed up and the service is not shutting down, otherwise 503.

    Needs no API key and does not count against the rate limit.
    """
    ready = service.engine.apparent_state is EngineState.OK
    return probe_response(request, service.engine, {"ready": ready}, ready)


@router.get(
    "/metrics",
    operation_id="get_metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(service: ServiceDependency) -> Response:
    """Returns all metrics in the Prometheus text format.

    Needs no API key and does not count against the rate limit.
    """
    return Response(service.metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})
