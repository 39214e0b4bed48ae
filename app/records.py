"""What is known of a request: noted while it is answered, then told to the metrics, the log and the trace."""

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.responses import Response
from starlette.types import Scope

from app.metrics import Metrics
from app.trajectory import Job

if TYPE_CHECKING:
    from app.traces import Traces

log = logging.getLogger("unfog.access")

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
    notes_of(scope).outcome = CLIENT_GONE
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def notes_of(scope: Scope) -> Notes:
    """Those of this request."""
    notes: Notes = scope["state"]["notes"]
    return notes


class Recorder:
    """Tells of each request that has ended. `paths` are those that may stand in a label."""

    def __init__(self, metrics: Metrics, traces: "Traces | None", paths: frozenset[str], quiet: frozenset[str]) -> None:
        """Requests to the `quiet` paths, of probes and scrapers, are logged at debug level where all is well."""
        self._metrics, self._traces, self._paths, self._quiet = metrics, traces, paths, quiet

    def record(self, scope: Scope, notes: Notes) -> None:
        """A request has ended."""
        ended_at, status = time.monotonic(), notes.status or CLIENT_CLOSED_REQUEST
        known = scope["path"] if scope["path"] in self._paths else "other"
        # It may have been answered before it was routed.
        route = str(getattr(scope.get("route"), "path", known))
        self._metrics.requests.labels(route, str(status)).inc()
        self._metrics.request_duration.labels(route).observe(ended_at - notes.started_at)
        facts = self._facts(scope, notes, route, status, ended_at - notes.started_at)
        if self._traces:
            facts |= self._traces.record(scope, notes, facts, ended_at)
        level = logging.DEBUG if route in self._quiet and status == 200 else logging.INFO
        path = scope["raw_path"].decode("ascii", "backslashreplace")  # as it came: decoded it could forge a line
        log.log(level, "%s %s", scope["method"], path, extra=facts)

    def _facts(self, scope: Scope, notes: Notes, route: str, status: int, seconds: float) -> dict[str, Any]:
        return {
            "request_id": notes.request_id,
            "route": route,
            "status": status,
            "outcome": notes.outcome or (CLIENT_GONE if status == CLIENT_CLOSED_REQUEST else OK),
            "client": (scope.get("client") or ("",))[0],
            "seconds": round(seconds, 6),
            **(_facts_of(notes.job, notes.encode_seconds) if notes.job else {}),
        }


def _facts_of(job: Job, encode_seconds: float) -> dict[str, Any]:
    """A job that never began waited to its end."""
    finished_at = job.finished_at or time.monotonic()
    started_at = job.started_at or finished_at
    options = job.options
    return {
        "model": options.model,
        "digit": options.digit,
        "count": job.count,
        "seed": options.seed,
        "num_steps": options.num_steps,
        "sampler": options.sampler,
        "guidance_scale": options.guidance_scale,
        "queue_seconds": round(started_at - job.submitted_at, 6),
        "denoise_seconds": round(finished_at - started_at, 6),
        "encode_seconds": round(encode_seconds, 6),
    }
