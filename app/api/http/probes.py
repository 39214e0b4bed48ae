"""The responses of probes."""

from fastapi import Request
from starlette.responses import JSONResponse

from app.api.http.context import context_of
from app.engine.engine import Engine, EngineState
from app.errors import Draining, EngineFailed, Starting

OUTCOMES = {  # state -> outcome of a failed probe in the access log
    EngineState.STARTING: Starting.code,
    EngineState.DRAINING: Draining.code,
    EngineState.FAILED: EngineFailed.code,
}


def probe_response(request: Request, engine: Engine, body: dict[str, object], good: bool) -> JSONResponse:
    """Returns the response of a probe: status 200 if the state of the engine is good, otherwise 503."""
    if not good:
        context_of(request.scope).outcome = OUTCOMES[engine.apparent_state]
    return JSONResponse(body, 200 if good else 503, {"Cache-Control": "no-store"})
