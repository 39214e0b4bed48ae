"""The access log: writes one log line per completed request, and updates its metrics and trace."""

import logging
import time
from typing import Any

from starlette.types import Scope

from app.api.http.client_address import client_address
from app.api.http.context import CLIENT_CLOSED_REQUEST, CLIENT_GONE, OK, RequestContext
from app.api.http.paths import Paths
from app.api.middleware.tracing import Traces
from app.engine.job import Job
from app.metrics import Metrics

log = logging.getLogger("unfog.access")


class AccessLog:
    """Logs requests. All paths that are not in `paths` share the label `other`, to limit the number of series."""

    def __init__(self, metrics: Metrics, traces: Traces | None, paths: Paths, quiet: Paths) -> None:
        """Successful requests to the `quiet` paths (probes and scrapes) are logged at level debug and not traced."""
        self._metrics, self._traces, self._paths, self._quiet = metrics, traces, paths, quiet

    def write(self, scope: Scope, context: RequestContext) -> None:
        """Logs a completed request."""
        ended_at, status = time.monotonic(), context.status or CLIENT_CLOSED_REQUEST
        known = self._paths.template_of(scope["path"]) or "other"
        # The scope has no route if a middleware has answered before routing.
        route = str(getattr(scope.get("route"), "path", known))
        self._metrics.requests.labels(route, str(status)).inc()
        self._metrics.request_duration.labels(route).observe(ended_at - context.started_at)
        fields = self._fields(scope, context, route, status, ended_at - context.started_at)
        is_quiet = route in self._quiet.templates and status == 200
        if self._traces and not is_quiet:
            fields |= self._traces.record(scope, context, fields, ended_at)
        level = logging.DEBUG if is_quiet else logging.INFO
        if log.isEnabledFor(level):
            path = scope["raw_path"].decode("ascii", "backslashreplace")  # a decoded path can contain line breaks
            # Logger.log() would search the stack for its caller, which no formatter writes.
            record = log.makeRecord(log.name, level, "", 0, "%s %s", (scope["method"], path), None, extra=fields)
            log.handle(record)

    def _fields(self, scope: Scope, context: RequestContext, route: str, status: int, seconds: float) -> dict[str, Any]:
        return {
            "request_id": context.request_id,
            "route": route,
            "status": status,
            "outcome": context.outcome or (CLIENT_GONE if status == CLIENT_CLOSED_REQUEST else OK),
            "client": client_address(scope),
            **({"key": context.key} if context.key else {}),
            "seconds": round(seconds, 6),
            **(_job_fields(context, context.job) if context.job else {}),
        }


def _job_fields(context: RequestContext, job: Job) -> dict[str, Any]:
    """Returns the options and times of a job. The queue time of a job that never started ends with the job."""
    timings, options = job.timings, job.request.options
    finished_at = timings.finished_at or time.monotonic()
    started_at = timings.started_at or finished_at
    images = job.request.images
    label = None if len({image.label for image in images}) > 1 else job.label
    return {
        "model": options.model,
        # The class is null until a search has found it. Class and seed are null if the images have different ones.
        **(context.class_facts(label) if context.class_facts else {}),
        "count": job.request.count,
        "seed": None if len({image.seed for image in images}) > 1 else options.seed,
        "num_steps": options.num_steps,
        "sampler": options.sampler,
        "guidance_scale": options.guidance_scale,
        "queue_seconds": round(started_at - timings.submitted_at, 6),
        "denoise_seconds": round(finished_at - started_at, 6),
        "encode_seconds": round(context.encode_seconds, 6),
    }
