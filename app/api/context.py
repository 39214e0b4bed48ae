"""What is noted of a request while it is answered, for those who tell of it when it has ended (records.py)."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from starlette.responses import Response
from starlette.types import Scope

from app.engine.job import Job
from app.metrics import Metrics

CLIENT_CLOSED_REQUEST = 499  # nginx's code for a client that left; nobody reads it but the log
OK, CLIENT_GONE = "ok", "client_gone"  # outcomes that are no error's code


@dataclass(slots=True)
class Notes:
    """Of one request; its handler adds what it knows. Times are of time.monotonic()."""

    request_id: str
    started_at: float = field(default_factory=time.monotonic)
    answered: ExitStack = field(default_factory=ExitStack)  # closed when the answer was sent or the client is gone
    status: int = 0  # 0 until an answer has begun
    outcome: str | None = None  # an error's code, also of a stream that ended with one
    key: int | None = None  # the place of the caller's among the keys
    job: Job | None = None
    encodings: list[tuple[float, float]] = field(default_factory=list)  # (start, end) of each

    @contextmanager
    def encoding(self, metrics: Metrics) -> Iterator[None]:
        """Images are being made into bytes."""
        start = time.monotonic()
        with metrics.encode_duration.time():
            yield
        self.encodings.append((start, time.monotonic()))

    @property
    def encode_seconds(self) -> float:
        """Of all of them."""
        return sum(end - start for start, end in self.encodings)


def client_gone(scope: Scope) -> Response:
    """What a handler returns when there is nobody to answer."""
    notes = notes_of(scope)
    notes.outcome = notes.outcome or CLIENT_GONE
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def notes_of(scope: Scope) -> Notes:
    """Those of this request."""
    notes: Notes = scope["state"]["notes"]
    return notes
