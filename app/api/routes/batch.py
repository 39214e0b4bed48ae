"""GET /events/batch: the running images of all requests, as an event stream for the page."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api.batch_events import BatchStream, BatchViewers
from app.api.context import context_of
from app.api.problems import error_response
from app.api.requests import negotiate
from app.api.responses import ERRORS, EVENTS, READ_ERRORS
from app.errors import Overloaded

router = APIRouter()


@router.get(
    "/events/batch",
    operation_id="watch_batch",
    response_class=Response,
    responses={
        200: {"description": "the running images", "content": {EVENTS: {"schema": {"type": "string"}}}},
        **READ_ERRORS,
        406: ERRORS[406],
        429: {**ERRORS[429], "description": "overloaded (there are 32 viewers) or rate_limited, with Retry-After"},
    },
)
async def batch(request: Request) -> Response:
    """Sends the running images of all requests, at most ten times a second, until the client disconnects."""
    negotiate(request, (EVENTS,))
    viewers: BatchViewers = request.app.state.viewers
    context = context_of(request.scope)
    try:
        viewer = context.answered.enter_context(viewers.watch())
    except Overloaded as error:  # It is not counted as a rejected request, because the queue can have room for images.
        return error_response(error, request.scope)
    return BatchStream(viewer)
