"""POST and GET /v1/batches: creates batches, lists them, and cancels them.

Everyone sees only the batches of their own API key.
"""

from typing import Annotated

from fastapi import Query, Request
from starlette.responses import JSONResponse, Response

from app.api.http.context import context_of
from app.api.http.media_types import JSON
from app.api.http.requests import read_body, read_json
from app.api.openai.batch_operations import (
    BATCH_BODY,
    BODY,
    CREATING,
    EXAMPLE_BATCH,
    FULL,
    INVALID,
    NO_STORE,
    NO_SUCH_BATCH,
    READ,
    After,
    batch_operation,
    batch_schema,
    check_id,
)
from app.api.openai.batch_schemas import BatchList, BatchObject, BatchRequest
from app.api.operations import Router, default_of
from app.api.service import ServiceDependency
from app.batches.batches import NOT_FOUND
from app.batches.records import Batch, BatchStatus, NewBatch
from app.errors import BodyTooLarge, UnsupportedMediaType

router = Router()

BATCHES_PATH, BATCH_PATH = "/v1/batches", "/v1/batches/{batch}"

Limit = Annotated[int, Query(ge=1, le=100, description="The largest number of batches of a page.")]


@router.operation(
    batch_operation(
        BATCHES_PATH,
        "create_batch",
        "Create a batch",
        EXAMPLE_BATCH,
        CREATING,
        method="POST",
        body=BATCH_BODY,
        errors=[BodyTooLarge(default_of("max_body_bytes")), UnsupportedMediaType()],
        complete=batch_schema,
    )
)
async def create_batch(request: Request, service: ServiceDependency) -> JSONResponse:
    """Answers the lines of a file in the background, when no other requests need the engine."""
    settings = service.settings
    body = await read_json(request, BatchRequest, settings.max_body_bytes, settings.read_timeout)
    new = NewBatch(
        input_file_id=body.input_file_id,
        endpoint=body.endpoint,
        metadata=body.metadata,
        output_lifetime=body.output_expires_after.seconds if body.output_expires_after else None,
        webhook_url=body.webhook_url,
    )
    batches = service.batches
    created = await batches.database.run(batches.batches.create, context_of(request.scope).owner, new)
    batches.wake()
    return _response(created)


@router.operation(
    batch_operation(
        BATCHES_PATH,
        "list_batches",
        "List the batches",
        BatchList(data=[EXAMPLE_BATCH], has_more=False, first_id=EXAMPLE_BATCH.id, last_id=EXAMPLE_BATCH.id),
        {400: INVALID, **READ},
    )
)
async def list_batches(request: Request, service: ServiceDependency, limit: Limit = 20, after: After = "") -> Response:
    """Returns a page of the batches. The newest batch is the first one."""
    batches, owner = service.batches, context_of(request.scope).owner

    def page() -> bytes:
        found, has_more = batches.batches.list(owner, after=after or None, limit=limit)
        return BatchList.of(found, has_more=has_more).model_dump_json().encode()

    # A page can be so large that the event loop would wait too long for its JSON.
    return Response(await batches.database.run(page), headers=NO_STORE, media_type=JSON)


@router.operation(batch_operation(BATCH_PATH, "get_batch", "Get a batch", EXAMPLE_BATCH, {**READ, **NO_SUCH_BATCH}))
async def get_batch(request: Request, batch: str, service: ServiceDependency) -> JSONResponse:
    """Returns the state of a batch. The files of its results are named when it has ended."""
    check_id(batch, NOT_FOUND)
    batches = service.batches
    return _response(await batches.database.run(batches.batches.get, context_of(request.scope).owner, batch))


@router.operation(
    batch_operation(
        f"{BATCH_PATH}/cancel",
        "cancel_batch",
        "Cancel a batch",
        EXAMPLE_BATCH.model_copy(
            update={"status": BatchStatus.CANCELLING, "cancelling_at": EXAMPLE_BATCH.created_at + 60}
        ),
        {**READ, **NO_SUCH_BATCH, **BODY, **FULL, 409: "conflict: the batch has ended"},
        method="POST",
        errors=[BodyTooLarge(default_of("max_body_bytes"))],
    )
)
async def cancel_batch(request: Request, batch: str, service: ServiceDependency) -> JSONResponse:
    """Cancels a batch. It keeps the answers of the lines that were answered before. The body is ignored."""
    settings, batches = service.settings, service.batches
    await read_body(request, settings.max_body_bytes, settings.read_timeout)
    check_id(batch, NOT_FOUND)
    cancelled = await batches.database.run(batches.batches.cancel, context_of(request.scope).owner, batch)
    batches.wake()
    return _response(cancelled)


def _response(batch: Batch) -> JSONResponse:
    return JSONResponse(BatchObject.of(batch).model_dump(), headers=NO_STORE)
