"""OpenTelemetry traces: one span per request, with child spans for queue, denoising and each encoding.

The spans are created after the end of a request, from the times in its context, so that tracing does not delay the
request. OpenTelemetry's variables configure the export, for example OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME and
OTEL_TRACES_SAMPLER.
"""

import os
import threading
import time
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Scope

from app import VERSION
from app.api.http.context import OK, RequestContext
from app.errors import Forbidden, Unauthorized

try:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    IMPORT_ERROR = None
except ImportError as error:
    IMPORT_ERROR = error

FLUSH_SECONDS = 2.0  # limit for sending the last spans at shutdown
MAX_PATH_LENGTH = 200


class TracesError(Exception):
    """UNFOG_TRACES is on, but OpenTelemetry is not installed."""


class Traces:
    """Sends spans in batches from a separate thread. A collector that does not respond does not affect requests."""

    def __init__(self) -> None:
        """Raises TracesError if OpenTelemetry is not installed."""
        if IMPORT_ERROR:
            message = "UNFOG_TRACES=on needs OpenTelemetry. Install it with: .venv/bin/pip install -e '.[traces]'"
            raise TracesError(message) from IMPORT_ERROR
        named = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": "unfog"}
        self._provider = TracerProvider(
            resource=Resource.create({**named, "service.version": VERSION}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("unfog", VERSION)
        self._propagator = TraceContextTextMapPropagator()

    def record(
        self, scope: Scope, context: RequestContext, fields: Mapping[str, Any], ended_at: float
    ) -> dict[str, str]:
        """Creates the spans of a completed request. Returns the ids of its trace and span, for the access log.

        Continues the trace of the request's traceparent header, unless auth has rejected the request.
        """
        is_rejected = fields["outcome"] in (Unauthorized.code, Forbidden.code)
        parent = None if is_rejected else self._propagator.extract(dict(Headers(scope=scope)))
        request = self._tracer.start_span(
            f"{scope['method']} {fields['route']}",
            parent,
            SpanKind.SERVER,
            attributes=_attributes(scope, fields),
            start_time=_nanoseconds(context.started_at),
        )
        if fields["status"] >= 500 or (fields["status"] == 200 and fields["outcome"] != OK):
            request.set_status(StatusCode.ERROR, str(fields["outcome"]))
        for name, start, end in _phases(context):
            self._child(request, name, start, end)
        request.end(_nanoseconds(ended_at))
        span = request.get_span_context()
        return {"trace_id": f"{span.trace_id:032x}", "span_id": f"{span.span_id:016x}"}

    def close(self) -> None:
        """Sends the remaining spans, for at most FLUSH_SECONDS. The time limit of the SDK is not reliable."""
        flushing = threading.Thread(target=self._provider.force_flush, daemon=True)
        flushing.start()
        flushing.join(FLUSH_SECONDS)

    def _child(self, request: "Span", name: str, start: float, end: float) -> None:
        context = set_span_in_context(request)
        self._tracer.start_span(name, context, start_time=_nanoseconds(start)).end(_nanoseconds(end))


def _phases(context: RequestContext) -> list[tuple[str, float, float]]:
    """Returns (name, start, end) of each phase. A job that never started has no denoise phase."""
    job = context.job
    if not job:
        return []
    timings = job.timings
    finished_at = timings.finished_at or time.monotonic()
    phases = [("queue", timings.submitted_at, timings.started_at or finished_at)]
    if timings.started_at:
        phases.append(("denoise", timings.started_at, finished_at))
    return phases + [("encode", start, end) for start, end in context.encodings]


def _attributes(scope: Scope, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns OpenTelemetry's attributes for HTTP, and the remaining fields with the prefix `unfog.`."""
    http = {
        "http.request.method": scope["method"],
        "http.route": fields["route"],
        "http.response.status_code": fields["status"],
        "url.path": scope["path"][:MAX_PATH_LENGTH],
        "url.scheme": scope["scheme"],
        "client.address": fields["client"],
    }
    others = set(fields) - {"route", "status", "client", "seconds"}
    return http | {f"unfog.{name}": fields[name] for name in others if not name.endswith("_seconds")}


def _nanoseconds(moment: float) -> int:
    """Converts a time of time.monotonic() to nanoseconds since 1970."""
    return time.time_ns() - round((time.monotonic() - moment) * 1e9)
