"""OpenTelemetry traces: a span for each request, with child spans for the queue, the denoising and each encoding.

Spans are made after a request has ended, from the times in its context. Before that, tracing costs no time. The
variables of OpenTelemetry configure the export: OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER
and others.
"""

import os
import threading
import time
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Scope

from app import VERSION
from app.api.context import OK, RequestContext
from app.errors import Forbidden, Unauthorized

try:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    MISSING = None
except ImportError as error:
    MISSING = error

LAST_SPANS_SECONDS = 2.0  # to send the last spans at shutdown
LONGEST_PATH = 200


class TracesError(Exception):
    """OpenTelemetry is not installed."""


class Traces:
    """Sends spans in batches from a separate thread. If the collector does not answer, only spans are lost."""

    def __init__(self) -> None:
        """Raises TracesError if OpenTelemetry is not installed."""
        if MISSING:
            raise TracesError("UNFOG_TRACES=on needs OpenTelemetry: .venv/bin/pip install -e '.[traces]'") from MISSING
        named = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": "unfog"}
        self._provider = TracerProvider(
            resource=Resource.create({**named, "service.version": VERSION}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("unfog", VERSION)
        self._propagator = TraceContextTextMapPropagator()

    def record(
        self, scope: Scope, context: RequestContext, facts: Mapping[str, Any], ended_at: float
    ) -> dict[str, str]:
        """Makes the spans of a request that has ended. Returns the ids of its trace and span, for the log.

        Continues the trace of the request's traceparent header, unless auth refused the request.
        """
        is_stranger = facts["outcome"] in (Unauthorized.code, Forbidden.code)
        parent = None if is_stranger else self._propagator.extract(dict(Headers(scope=scope)))
        request = self._tracer.start_span(
            f"{scope['method']} {facts['route']}",
            parent,
            SpanKind.SERVER,
            attributes=_attributes(scope, facts),
            start_time=_nanoseconds(context.started_at),
        )
        if facts["status"] >= 500 or (facts["status"] == 200 and facts["outcome"] != OK):
            request.set_status(StatusCode.ERROR, str(facts["outcome"]))
        for name, start, end in _phases(context):
            self._child(request, name, start, end)
        request.end(_nanoseconds(ended_at))
        span = request.get_span_context()
        return {"trace_id": f"{span.trace_id:032x}", "span_id": f"{span.span_id:016x}"}

    def close(self) -> None:
        """Sends the remaining spans, for at most LAST_SPANS_SECONDS. The SDK does not keep its own time limit."""
        flushing = threading.Thread(target=self._provider.force_flush, daemon=True)
        flushing.start()
        flushing.join(LAST_SPANS_SECONDS)

    def _child(self, request: "Span", name: str, start: float, end: float) -> None:
        context = set_span_in_context(request)
        self._tracer.start_span(name, context, start_time=_nanoseconds(start)).end(_nanoseconds(end))


def _phases(context: RequestContext) -> list[tuple[str, float, float]]:
    """Returns the name, start and end of each phase. A job that never started has no denoise phase."""
    job = context.job
    if not job:
        return []
    timings = job.timings
    finished_at = timings.finished_at or time.monotonic()
    phases = [("queue", timings.submitted_at, timings.started_at or finished_at)]
    if timings.started_at:
        phases.append(("denoise", timings.started_at, finished_at))
    return phases + [("encode", start, end) for start, end in context.encodings]


def _attributes(scope: Scope, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns attributes with OpenTelemetry's names for HTTP, and with our names for the rest."""
    http = {
        "http.request.method": scope["method"],
        "http.route": facts["route"],
        "http.response.status_code": facts["status"],
        "url.path": scope["path"][:LONGEST_PATH],
        "url.scheme": scope["scheme"],
        "client.address": facts["client"],
    }
    ours = set(facts) - {"route", "status", "client", "seconds"}
    return http | {f"unfog.{name}": facts[name] for name in ours if not name.endswith("_seconds")}


def _nanoseconds(moment: float) -> int:
    """Returns a time of time.monotonic() as nanoseconds since 1970."""
    return time.time_ns() - round((time.monotonic() - moment) * 1e9)
