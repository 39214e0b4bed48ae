"""POST, GET and DELETE /v1/files: uploads files of requests, lists them, and returns the results of batches.

Everyone sees only the files of their own API key.
"""

from functools import partial
from typing import Annotated, Literal
from urllib.parse import quote

from fastapi import Query, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from app.api.http.client_address import client_name
from app.api.http.context import CLIENT_GONE, context_of
from app.api.http.file_upload import SILENT, receive_file
from app.api.http.media_types import JSON, MULTIPART, OCTETS
from app.api.http.requests import ClientGoneError, cancel_on_disconnect
from app.api.openai.batch_operations import (
    EXAMPLE_FILE,
    FULL,
    INVALID,
    NO_STORE,
    NO_SUCH_FILE,
    READ,
    UPLOAD_BODY,
    UPLOADING,
    After,
    batch_operation,
    check_id,
    upload_schema,
)
from app.api.openai.batch_schemas import FileDeleted, FileList, FileObject
from app.api.operations import BINARY, Router, default_of
from app.api.service import Service, ServiceDependency
from app.batches.files import NOT_FOUND
from app.batches.records import File
from app.batches.service import BatchService
from app.errors import (
    BodyTooLarge,
    Conflict,
    NotFound,
    RequestTimeout,
    UnfogError,
    UnsupportedMediaType,
)

router = Router()

FILES_PATH, FILE_PATH = "/v1/files", "/v1/files/{file}"
DEFAULT_LIMIT, MAX_LIMIT = 1000, 10_000  # files of a page

Limit = Annotated[int, Query(ge=1, le=MAX_LIMIT, description="The largest number of files of a page.")]
Purpose = Annotated[
    str, Query(max_length=64, pattern="^[!-~]*$", description="Only files with this purpose: batch or batch_output.")
]
Order = Annotated[Literal["asc", "desc"], Query(description="desc: the newest file is the first one.")]


@router.operation(
    batch_operation(
        FILES_PATH,
        "create_file",
        "Upload a file of requests",
        EXAMPLE_FILE,
        UPLOADING,
        method="POST",
        body=UPLOAD_BODY,
        errors=[
            RequestTimeout(SILENT.format(seconds=default_of("read_timeout"))),
            BodyTooLarge(default_of("max_file_bytes")),
            UnsupportedMediaType(f"Content-Type must be {MULTIPART}"),
        ],
        complete=upload_schema,
    )
)
async def create_file(request: Request, service: ServiceDependency) -> JSONResponse:
    """Stores a file whose lines are requests in JSON. POST /v1/batches answers them."""
    batches = service.batches
    with batches.one_upload(client_name(request.scope, context_of(request.scope).key)):
        file = await receive_file(request, batches.database, batches.files, service.settings)
    return JSONResponse(FileObject.of(file).model_dump(), headers=NO_STORE)


@router.operation(
    batch_operation(
        FILES_PATH,
        "list_files",
        "List the files",
        FileList(data=[EXAMPLE_FILE], has_more=False, first_id=EXAMPLE_FILE.id, last_id=EXAMPLE_FILE.id),
        {400: INVALID, **READ},
    )
)
async def list_files(
    request: Request,
    service: ServiceDependency,
    limit: Limit = DEFAULT_LIMIT,
    purpose: Purpose = "",
    after: After = "",
    order: Order = "desc",
) -> Response:
    """Returns a page of the files."""
    batches, owner = service.batches, context_of(request.scope).owner
    find = partial(batches.files.list, purpose=purpose or None, after=after or None, limit=limit)

    def page() -> bytes:
        files, has_more = find(owner, newest_first=order == "desc")
        return FileList.of(files, has_more=has_more).model_dump_json().encode()

    # A page can be so large that the event loop would wait too long for its JSON.
    return Response(await batches.database.run(page), headers=NO_STORE, media_type=JSON)


@router.operation(batch_operation(FILE_PATH, "get_file", "Get a file", EXAMPLE_FILE, {**READ, **NO_SUCH_FILE}))
async def get_file(request: Request, file: str, service: ServiceDependency) -> JSONResponse:
    """Returns the description of a file. GET /v1/files/{file}/content returns what it contains."""
    return JSONResponse(FileObject.of(await _find(request, service, file)).model_dump(), headers=NO_STORE)


@router.operation(
    batch_operation(
        FILE_PATH,
        "delete_file",
        "Delete a file",
        FileDeleted(id=EXAMPLE_FILE.id),
        {**READ, **NO_SUCH_FILE, **FULL, 409: "conflict: a batch is reading the file"},
        method="DELETE",
        errors=[Conflict("batch_2b7d9e0f4c6a4e1b9d8f7a35 is reading this file. Retry when its status is in_progress")],
    )
)
async def delete_file(request: Request, file: str, service: ServiceDependency) -> JSONResponse:
    """Deletes a file and its content."""
    check_id(file, NOT_FOUND)
    batches = service.batches
    await batches.database.run(batches.files.delete, context_of(request.scope).owner, file)
    return JSONResponse(FileDeleted(id=file).model_dump(), headers=NO_STORE)


@router.operation(
    batch_operation(
        f"{FILE_PATH}/content",
        "get_file_content",
        "Get the content of a file",
        None,
        {**READ, **NO_SUCH_FILE},
        description="the lines of the file",
        formats={OCTETS: BINARY},
    )
)
async def get_content(request: Request, file: str, service: ServiceDependency) -> Response:
    """Returns the content of a file: the uploaded bytes, or the results of a batch as lines of JSON."""
    return FileContent(await _find(request, service, file), service.batches)


async def _find(request: Request, service: Service, file_id: str) -> File:
    check_id(file_id, NOT_FOUND)
    batches = service.batches
    return await batches.database.run(batches.files.get, context_of(request.scope).owner, file_id)


class FileContent(Response):
    """Sends the content of a file in blocks, until the client disconnects. HEAD reads no block.

    If an error occurs, the connection is closed before the end of the body, so that the client notices it.
    """

    def __init__(self, file: File, batches: BatchService) -> None:
        headers = {**NO_STORE, "Content-Disposition": _disposition(file.filename)}
        super().__init__(headers=headers, media_type=OCTETS)
        self.headers["Content-Length"] = str(file.bytes)
        self._file, self._batches = file, batches

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the response."""
        context = context_of(scope)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if context.is_head:
            await send({"type": "http.response.body", "body": b""})
            return
        try:
            await cancel_on_disconnect(Request(scope, receive), self._send_blocks(send))
        except ClientGoneError:
            context.outcome = CLIENT_GONE
        except UnfogError as error:
            context.outcome = error.code

    async def _send_blocks(self, send: Send) -> None:
        """Sends all blocks. The body ends with the last byte, because a client may disconnect as soon as it has it."""
        file, batches = self._file, self._batches
        blocks, left = batches.files.content(file.owner, file.id), file.bytes
        while left:
            block = await batches.database.next_of(blocks)
            if block is None:
                raise NotFound(NOT_FOUND)  # The file was deleted meanwhile.
            left -= len(block)
            await send({"type": "http.response.body", "body": block, "more_body": left > 0})


def _disposition(filename: str) -> str:
    """Returns the value of Content-Disposition, which makes a browser save the file (RFC 6266)."""
    quoted = quote(filename, safe="")
    name = f'filename="{filename}"' if quoted == filename else f"filename*=UTF-8''{quoted}"
    return f"attachment; {name}"
