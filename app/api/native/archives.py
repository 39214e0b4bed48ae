"""GET /batches/{batch}/images.zip and /batches/{batch}/images.parquet: the images of a batch in one file."""

from collections.abc import Callable

from fastapi import Request
from starlette.responses import Response

from app import errors
from app.api.http.block_stream import BlockStream
from app.api.http.context import context_of
from app.api.http.media_types import ZIP
from app.api.openai.batch_operations import NO_SUCH_BATCH, READ, check_id
from app.api.operations import BINARY, Operation, Router
from app.api.service import Service, ServiceDependency
from app.batches.archives import NEEDS_PYARROW, Answers, Blocks, parquet_blocks, zip_blocks
from app.batches.batches import NOT_FOUND

router = Router()

PARQUET = "application/vnd.apache.parquet"
STATUSES = {
    **READ,
    **NO_SUCH_BATCH,
    429: "overloaded (too many archives are being downloaded) or rate_limited, with Retry-After",
}


@router.operation(
    Operation(
        path="/batches/{batch}/images.zip",
        name="get_batch_zip",
        group="Batches",
        summary="Get the images of a batch as a ZIP archive",
        description="the PNG files of the lines that have succeeded so far, and metadata.jsonl with the file_name, "
        "custom_id, line, index, seed and label of each image",
        formats={ZIP: BINARY},
        statuses=STATUSES,
        errors=[errors.NotFound(NOT_FOUND)],
    )
)
async def images_zip(batch: str, request: Request, service: ServiceDependency) -> Response:
    """Returns the PNG files of the lines that have succeeded so far, and a file that names the line of each image.

    If the connection is closed before the end of the archive, an error has occurred. Send the request again.
    """
    return await _archive(service, request, batch, zip_blocks, "zip", ZIP)


@router.operation(
    Operation(
        path="/batches/{batch}/images.parquet",
        name="get_batch_parquet",
        group="Batches",
        summary="Get the images of a batch as a Parquet file",
        description="the images of the lines that have succeeded so far, with the columns image, custom_id, line, "
        "index, seed and label",
        formats={PARQUET: BINARY},
        statuses={**STATUSES, 501: "not_available: pyarrow is not installed"},
        errors=[errors.NotFound(NOT_FOUND), errors.NotAvailable(NEEDS_PYARROW)],
    )
)
async def images_parquet(batch: str, request: Request, service: ServiceDependency) -> Response:
    """Returns a data set in the layout of the Hugging Face Hub, with a row for each image of the finished lines.

    If the connection is closed before the end of the file, an error has occurred. Send the request again.
    """
    return await _archive(service, request, batch, parquet_blocks, "parquet", PARQUET)


async def _archive(
    service: Service,
    request: Request,
    batch_id: str,
    blocks_of: Callable[[Answers], Blocks],
    extension: str,
    media_type: str,
) -> Response:
    """Returns the response with an archive. Raises NotFound, NotAvailable or Overloaded before the response starts."""
    check_id(batch_id, NOT_FOUND)
    context, batches, database = context_of(request.scope), service.batches.batches, service.batches.database
    answers = await database.run(batches.answers, context.owner, batch_id)
    if not context.is_head:
        context.answered.enter_context(service.batches.one_archive())
    blocks = await database.run(blocks_of, answers)
    disposition = f'attachment; filename="{batch_id}.{extension}"'
    return BlockStream(blocks, database, media_type, {"Content-Disposition": disposition})
