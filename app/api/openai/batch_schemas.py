"""The schemas of requests and responses of the OpenAI Files and Batch APIs.

The names of the fields are those of OpenAI, except `webhook_url`, `images`, `images_per_second` and `seconds_left`.
Times are seconds since the epoch. A field of a response without a value is null.
"""

from dataclasses import asdict
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.api.http.file_upload import MAX_LIFETIME, MIN_LIFETIME
from app.batches.records import Batch, BatchStatus, File
from app.tasks.fields import WHOLE

MAX_PAIRS, MAX_KEY, MAX_VALUE = 16, 64, 512  # of the metadata; the lengths are in characters
MAX_ID, MAX_URL = 64, 2048
PRINTABLE = r"^[!-~]+$"  # ASCII without spaces

Id = Annotated[str, Field(max_length=MAX_ID, pattern=PRINTABLE)]
Url = Annotated[str, Field(max_length=MAX_URL, pattern=PRINTABLE)]
Key = Annotated[str, Field(max_length=MAX_KEY)]
Value = Annotated[str, Field(max_length=MAX_VALUE)]
Time = int | None


class FileObject(BaseModel):
    """A file of requests, or of their results."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: Time = Field(description="The file is deleted at this time. null: it is not deleted.")
    filename: str
    purpose: Literal["batch", "batch_output"] = Field(description="batch: an uploaded file. batch_output: results.")
    status: Literal["processed"] = "processed"

    @classmethod
    def of(cls, file: File) -> "FileObject":
        """Returns the description of a file."""
        return cls.model_validate(file, from_attributes=True)


class FileList(BaseModel):
    """A page of a list of files."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    has_more: bool = Field(description="True if files follow. Get them with `after` and the value of `last_id`.")
    first_id: str | None
    last_id: str | None

    @classmethod
    def of(cls, files: list[File], *, has_more: bool) -> "FileList":
        """Returns a page of a list."""
        ids: list[str | None] = [each.id for each in files] or [None]
        data = [FileObject.of(each) for each in files]
        return cls(data=data, has_more=has_more, first_id=ids[0], last_id=ids[-1])


class FileDeleted(BaseModel):
    """The id of a file that has been deleted."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class ExpiresAfter(BaseModel):
    """The lifetime of a file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    anchor: Literal["created_at"]
    seconds: Annotated[
        int, Field(ge=MIN_LIFETIME, le=MAX_LIFETIME, description="Seconds from the creation of the file."), WHOLE
    ]


class BatchRequest(BaseModel):
    """The batch to create."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    input_file_id: Annotated[Id, Field(description="An uploaded file. Each line is a request in JSON.")]
    endpoint: Annotated[Url, Field(description="The path of a POST operation. It is the `url` of all lines.")]
    completion_window: Literal["24h"] = Field(description="After this time, a batch that has not ended expires.")
    metadata: Annotated[dict[Key, Value], Field(max_length=MAX_PAIRS)] | None = Field(
        default=None, description="Names and values of the caller, which are returned with the batch."
    )
    output_expires_after: ExpiresAfter | None = Field(
        default=None, description="When the files of results expire. Without it, they expire as uploaded files do."
    )
    webhook_url: Url | None = Field(
        default=None,
        description="Receives a signed event when the batch has ended. UNFOG_WEBHOOK_HOSTS permits its host. OpenAI "
        "does not have this field.",
    )


class BatchErrorObject(BaseModel):
    """A reason why a batch has failed."""

    code: str
    line: int | None = Field(description="The number of the line in the input file, from 1.")
    message: str
    param: str | None


class BatchErrors(BaseModel):
    """The reasons why a batch has failed."""

    object: Literal["list"] = "list"
    data: list[BatchErrorObject]


class RequestCounts(BaseModel):
    """The numbers of lines. The lines that are neither completed nor failed have not been answered."""

    total: int
    completed: int
    failed: int


class BatchObject(BaseModel):
    """A batch. `images`, `images_per_second` and `seconds_left` are not in OpenAI's API."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: None = Field(default=None, description="Always null, because each line can name its model.")
    errors: BatchErrors | None = Field(description="The errors in the input file of a batch that has failed.")
    input_file_id: str
    completion_window: Literal["24h"] = "24h"
    status: BatchStatus
    output_file_id: str | None = Field(description="The answers of the lines that succeeded.")
    error_file_id: str | None = Field(description="The errors of the lines that failed.")
    created_at: int
    in_progress_at: Time
    expires_at: Time = Field(description="A batch that has not ended at this time expires.")
    finalizing_at: Time
    completed_at: Time
    failed_at: Time
    expired_at: Time
    cancelling_at: Time
    cancelled_at: Time
    request_counts: RequestCounts
    usage: None = Field(default=None, description="Always null, because the service counts no tokens.")
    metadata: dict[str, str] | None
    images: int = Field(description="The number of images in the answers.")
    images_per_second: float | None = Field(description="The speed in the last minute. null if it is not known.")
    seconds_left: float | None = Field(description="The estimated time until the batch ends. null if it is not known.")

    @classmethod
    def of(cls, batch: Batch) -> "BatchObject":
        """Returns the description of a batch."""
        errors = [BatchErrorObject.model_validate(each, from_attributes=True) for each in batch.errors]
        own = {
            "errors": BatchErrors(data=errors) if errors else None,
            "request_counts": RequestCounts.model_validate(batch, from_attributes=True),
        }
        return cls(**{**asdict(batch), **own})


class BatchList(BaseModel):
    """A page of a list of batches."""

    object: Literal["list"] = "list"
    data: list[BatchObject]
    has_more: bool = Field(description="True if batches follow. Get them with `after` and the value of `last_id`.")
    first_id: str | None
    last_id: str | None

    @classmethod
    def of(cls, batches: list[Batch], *, has_more: bool) -> "BatchList":
        """Returns a page of a list."""
        ids: list[str | None] = [each.id for each in batches] or [None]
        data = [BatchObject.of(each) for each in batches]
        return cls(data=data, has_more=has_more, first_id=ids[0], last_id=ids[-1])
