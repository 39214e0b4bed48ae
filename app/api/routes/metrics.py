"""GET /metrics, for Prometheus."""

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from app.api.generation import Service

router = APIRouter()


@router.get(
    "/metrics",
    operation_id="get_metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request) -> Response:
    """Returns all metrics in Prometheus' text format."""
    service: Service = request.app.state.service
    return Response(service.metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})
