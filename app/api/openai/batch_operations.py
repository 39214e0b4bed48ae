"""What the operations of the OpenAI Files and Batch APIs have in common: their statuses, bodies and examples."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import Query
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from app.api.http.file_upload import (
    ANCHOR,
    CREATED_AT,
    FILE,
    MAX_FILENAME,
    MAX_LIFETIME,
    MIN_LIFETIME,
    PURPOSE,
    SECONDS,
)
from app.api.http.media_types import MULTIPART, OCTETS
from app.api.openai.batch_schemas import MAX_ID, BatchObject, BatchRequest, FileObject, RequestCounts
from app.api.openai.schemas import OpenAIError
from app.api.operations import FILE as FILE_CONTENT
from app.api.operations import READ_STATUSES, REF, STATUS, Offer, Operation, Schema, body_of, default_of
from app.batches.batches import NOT_FOUND as NO_BATCH
from app.batches.files import NOT_FOUND as NO_FILE
from app.batches.records import COMPLETION_SECONDS, UPLOADED, BatchStatus
from app.errors import InvalidRequest, NotFound

NO_STORE = {"Cache-Control": "no-store"}
UPLOAD_SCHEMA = "FileUploadForm"
EXAMPLE_TIME = 1_790_000_000
_ID = re.compile(rf"[0-9A-Za-z_-]{{1,{MAX_ID}}}")

# The statuses of errors. READ are those of all operations.
READ = {**READ_STATUSES, 503: "storage_unavailable (the database does not answer) or draining, with Retry-After"}
INVALID = "invalid_request: `param` names a field or a parameter that is missing, unknown or invalid"
NO_SUCH_FILE = {404: "not_found: no file with this id exists"}
NO_SUCH_BATCH = {404: "not_found: no batch with this id exists"}
FULL = {507: "storage_full: the disk or the database has no room"}
BODY = {status: STATUS[status] for status in (408, 413, 431)}
CREATING = {
    **READ,
    **BODY,
    **FULL,
    400: f"malformed_json. {INVALID}",
    403: f"{STATUS[403]}. quota_exceeded: the API key has reached a limit of files, batches or bytes",
    415: STATUS[415],
}
UPLOADING = {
    **CREATING,
    400: f"malformed_request. {INVALID}",
    408: "request_timeout: no byte of the body arrived for UNFOG_READ_TIMEOUT seconds, or it arrived too slowly",
    413: "body_too_large: the file exceeds UNFOG_MAX_FILE_BYTES",
    415: f"unsupported_media_type: Content-Type is not {MULTIPART}",
    429: "overloaded (too many files are being uploaded) or rate_limited, with Retry-After",
}

EXAMPLE_FILE = FileObject(
    id="file-6a4f0c1d9b7e4f2a8c3d5e61",
    bytes=1_310_000,
    created_at=EXAMPLE_TIME,
    expires_at=EXAMPLE_TIME + default_of("file_days") * 24 * 3600,
    filename="digits.jsonl",
    purpose="batch",
)
EXAMPLE_BATCH = BatchObject(
    id="batch_2b7d9e0f4c6a4e1b9d8f7a35",
    endpoint="/v1/images/generations",
    errors=None,
    input_file_id=EXAMPLE_FILE.id,
    status=BatchStatus.IN_PROGRESS,
    output_file_id=None,
    error_file_id=None,
    created_at=EXAMPLE_TIME + 5,
    in_progress_at=EXAMPLE_TIME + 7,
    expires_at=EXAMPLE_TIME + 5 + COMPLETION_SECONDS,
    finalizing_at=None,
    completed_at=None,
    failed_at=None,
    expired_at=None,
    cancelling_at=None,
    cancelled_at=None,
    request_counts=RequestCounts(total=10_000, completed=2500, failed=0),
    metadata={"set": "digits"},
    images=25_000,
    images_per_second=50.0,
    seconds_left=1500.0,
)
UPLOAD_BODY: dict[str, Schema] = {
    MULTIPART: {
        "schema": {"$ref": REF.format(model=UPLOAD_SCHEMA)},
        "examples": {
            "file": {"summary": "A file of requests", "value": {PURPOSE: UPLOADED, FILE: FILE_CONTENT}},
            "expires": {
                "summary": "A file that expires after a day",
                "value": {PURPOSE: UPLOADED, ANCHOR: CREATED_AT, SECONDS: 86_400, FILE: FILE_CONTENT},
            },
        },
    }
}
BATCH_BODY = body_of(
    BatchRequest,
    {
        "images": (
            "Images for each line of a file",
            {"input_file_id": EXAMPLE_FILE.id, "endpoint": EXAMPLE_BATCH.endpoint, "completion_window": "24h"},
        ),
        "named": (
            "A batch with metadata, whose results expire after a week",
            {
                "input_file_id": EXAMPLE_FILE.id,
                "endpoint": EXAMPLE_BATCH.endpoint,
                "completion_window": "24h",
                "metadata": EXAMPLE_BATCH.metadata,
                "output_expires_after": {"anchor": CREATED_AT, "seconds": 604_800},
            },
        ),
    },
)
After = Annotated[
    str,
    Query(max_length=MAX_ID, pattern="^[!-~]*$", description="The id after which the page begins, such as `last_id`."),
]


def batch_operation(
    path: str, name: str, summary: str, answer: BaseModel | None, statuses: Mapping[int, str], **options: Any
) -> Operation:
    """Returns an operation. `answer` is the example of its JSON answer, and `statuses` are those of its errors."""
    missing = NO_FILE if path.startswith("/v1/files") else NO_BATCH
    return Operation(
        path=path,
        name=name,
        group="Batches",
        summary=summary,
        answer=type(answer) if answer else None,
        example=answer.model_dump(mode="json") if answer else None,
        error=OpenAIError,
        statuses=statuses,
        errors=[NotFound(missing), InvalidRequest.of("after", missing), *options.pop("errors", ())],
        **options,
    )


def check_id(text: str, missing: str) -> None:
    """Raises NotFound for a text that is not an id. `missing` is the detail for an id that does not exist."""
    if not _ID.fullmatch(text):
        raise NotFound(missing)


def upload_schema(operation: Schema, offer: Offer) -> dict[str, Schema]:
    """Returns the schema of the body of an upload."""
    lifetime = {"type": "integer", "minimum": MIN_LIFETIME, "maximum": MAX_LIFETIME}
    properties: Schema = {
        PURPOSE: {"const": UPLOADED, "type": "string"},
        FILE: {
            "type": "string",
            "contentMediaType": OCTETS,
            "description": f"Lines of JSON, at most {offer.settings.max_file_bytes} bytes together. The filename has "
            f"at most {MAX_FILENAME} characters.",
        },
        ANCHOR: {"const": CREATED_AT, "type": "string", "examples": [""]},  # see `form_schema`
        SECONDS: {**lifetime, "examples": [""], "description": "Seconds until the file is deleted."},
    }
    schema: Schema = {
        "title": UPLOAD_SCHEMA,
        "description": "A file of requests for a batch.",
        "type": "object",
        "properties": properties,
        "required": [PURPOSE, FILE],
        "dependentRequired": {ANCHOR: [SECONDS], SECONDS: [ANCHOR]},
        "additionalProperties": False,
    }
    return {UPLOAD_SCHEMA: schema}


def batch_schema(operation: Schema, offer: Offer) -> dict[str, Schema]:
    """Returns the schemas of the body of a new batch."""
    _, definitions = models_json_schema([(BatchRequest, "validation")], ref_template=REF)
    schemas: dict[str, Schema] = definitions["$defs"]
    return schemas
