"""The request context: data about a request that the access log and the trace need."""

import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Scope

from app.engine.job import Job
from app.metrics import Metrics

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")  # valid X-Request-ID; any other value is replaced
CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that disconnected; only logged, never sent
OK, CLIENT_GONE = "ok", "client_gone"  # outcomes that are not error codes


@dataclass(slots=True)
class RequestContext:
    """The context of one request. It is filled while the request is processed. Times are from time.monotonic()."""

    request_id: str
    started_at: float = field(default_factory=time.monotonic)
    answered: ExitStack = field(default_factory=ExitStack)  # closed after the response or after a disconnect
    is_background: bool = False  # True for a line of a batch, which has no deadline and no client that waits
    is_head: bool = False  # True if the method is HEAD: the client wants only the headers
    may_abort: bool = False  # True if a shutdown need not wait for a client that does not read the response
    status: int = 0  # 0 until the response starts
    outcome: str | None = None  # error code of the response or of a stream's error event
    key: int | None = None  # position of the caller's API key in UNFOG_API_KEYS, from 1
    owner: str = ""  # of the caller's files and batches: a digest of the API key; empty without API keys
    job: Job | None = None
    # Returns the facts about the class of the job (see Task.class_facts).
    class_facts: Callable[[int | None], dict[str, Any]] | None = None
    encodings: list[tuple[float, float]] = field(default_factory=list)  # start and end of each encoding

    @contextmanager
    def encoding(self, metrics: Metrics) -> Iterator[None]:
        """Adds the start and the end of the `with` block to `encodings`, and its duration to the metrics."""
        start = time.monotonic()
        yield
        end = time.monotonic()
        self.encodings.append((start, end))
        metrics.encode_duration.observe(end - start)

    @property
    def encode_seconds(self) -> float:
        """The total time of all encodings."""
        return sum(end - start for start, end in self.encodings)


def context_of(scope: Scope) -> RequestContext:
    """Returns the context of a request. The first call for a request creates it."""
    state = scope.setdefault("state", {})
    if "context" not in state:
        state["context"] = RequestContext(_request_id(scope))
    context: RequestContext = state["context"]
    return context


def _request_id(scope: Scope) -> str:
    """Returns the X-Request-ID of the client if it is valid, otherwise a new id."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and REQUEST_ID.fullmatch(value.decode("latin-1")):
            return str(value.decode("latin-1"))
    return new_request_id()


def new_request_id() -> str:
    """Returns a random id, which is not secret.

    uuid.uuid4() would release the GIL for a system call. Then the engine thread takes it, and the event loop waits.
    """
    return f"{random.getrandbits(128):032x}"
