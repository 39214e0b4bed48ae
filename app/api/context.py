"""The request context: facts about a request for the access log and the trace, collected while it is answered."""

import re
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from starlette.types import Scope

from app.engine.job import Job

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")  # an id that a client may set; any other is replaced
CLIENT_CLOSED_REQUEST = 499  # nginx's code for a client that left; it appears only in the log
OK, CLIENT_GONE = "ok", "client_gone"  # outcomes that are not the code of an error


@dataclass(slots=True)
class RequestContext:
    """The context of one request. Its handler fills in the fields. Times are seconds of time.monotonic()."""

    request_id: str
    started_at: float = field(default_factory=time.monotonic)
    answered: ExitStack = field(default_factory=ExitStack)  # closed when the answer was sent or the client is gone
    status: int = 0  # 0 until an answer has begun
    outcome: str | None = None  # the code of an error, also if a stream ended with it
    key: int | None = None  # the place of the caller's API key in the list of keys, from 1
    job: Job | None = None
    encodings: list[tuple[float, float]] = field(default_factory=list)  # (start, end) of each

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Measures the time in which images are encoded."""
        start = time.monotonic()
        yield
        self.encodings.append((start, time.monotonic()))

    @property
    def encode_seconds(self) -> float:
        """Returns the seconds of all encodings together."""
        return sum(end - start for start, end in self.encodings)


def context_of(scope: Scope) -> RequestContext:
    """Returns the context of a request. The first call creates it."""
    state = scope.setdefault("state", {})
    if "context" not in state:
        state["context"] = RequestContext(_request_id(scope))
    context: RequestContext = state["context"]
    return context


def _request_id(scope: Scope) -> str:
    """Returns the client's request id if it matches REQUEST_ID, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and REQUEST_ID.fullmatch(value.decode("latin-1")):
            return str(value.decode("latin-1"))
    return uuid.uuid4().hex
