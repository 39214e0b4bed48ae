"""What the database returns: files, batches and lines as values without a connection."""

from dataclasses import dataclass
from enum import StrEnum

UPLOADED, OUTPUT = "batch", "batch_output"  # the purposes of files
COMPLETION_SECONDS = 24 * 3600  # after this time, a batch that has not ended expires


class BatchStatus(StrEnum):
    """The status of a batch, as in OpenAI's Batch API."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


UNFINISHED = (BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS, BatchStatus.FINALIZING, BatchStatus.CANCELLING)


@dataclass(frozen=True, slots=True)
class File:
    """An uploaded file, or a file of results. Times are seconds since the epoch."""

    id: str
    owner: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    expires_at: int | None


@dataclass(frozen=True, slots=True)
class NewBatch:
    """A request for a batch. `output_lifetime` is in seconds."""

    input_file_id: str
    endpoint: str
    metadata: dict[str, str] | None = None
    output_lifetime: int | None = None
    webhook_url: str | None = None


@dataclass(frozen=True, slots=True)
class BatchError:
    """A reason why a batch has failed. `line` counts from 1."""

    code: str
    line: int | None
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A batch. Times are seconds since the epoch, and None if the batch had no such status."""

    id: str
    owner: str
    endpoint: str
    input_file_id: str
    status: BatchStatus
    metadata: dict[str, str] | None
    errors: tuple[BatchError, ...]
    created_at: int
    expires_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    output_file_id: str | None
    error_file_id: str | None
    total: int  # lines
    completed: int  # lines that succeeded
    failed: int
    images: int  # in the answers
    images_per_second: float | None  # of the last minute; None unless lines are being answered by this process
    seconds_left: float | None


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a batch that is to be answered. `body` is the JSON of the request."""

    batch_id: str
    number: int  # of the line in the file, from 1
    custom_id: str
    endpoint: str
    body: bytes

    @property
    def key(self) -> str:
        """Returns the key from which the seed follows if the line has none (see app/api/http/idempotency.py)."""
        return f"{self.batch_id}_{self.number}"


@dataclass(frozen=True, slots=True)
class LineAnswer:
    """The answer to a line. `body` is JSON."""

    status: int
    request_id: str
    body: bytes
    images: int  # in the answer
    evaluations: int  # network evaluations that were computed for it
