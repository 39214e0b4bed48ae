"""Tests of the traces that a collector receives over HTTP."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from app import VERSION
from app.api.middleware import tracing
from app.api.middleware.tracing import Traces, TracesError
from tests.app.application import WORK, run
from tests.app.fakes import FakeRunner, Rows

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SERVER = 2  # SPAN_KIND_SERVER
ERROR = 2  # STATUS_CODE_ERROR


class Collector(ThreadingHTTPServer):
    """Receives OTLP over HTTP (protobuf) and collects the spans."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.exports: list[ExportTraceServiceRequest] = []
        self.status = 200
        self.may_respond = threading.Event()
        self.may_respond.set()

    @property
    def spans(self) -> list[Any]:
        """All received spans."""
        return [
            span
            for export in self.exports
            for resource in export.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def resource(self) -> dict[str, str]:
        """The attributes of the resource (the service)."""
        return attributes(self.exports[0].resource_spans[0].resource)


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        assert (self.path, self.headers["content-type"]) == ("/v1/traces", "application/x-protobuf")
        self.server.exports.append(ExportTraceServiceRequest.FromString(body))
        self.server.may_respond.wait()
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def attributes(holder: Any) -> dict[str, Any]:
    values = {item.key: item.value for item in holder.attributes}
    return {key: getattr(value, value.WhichOneof("value")) for key, value in values.items()}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with Collector() as server, ThreadPoolExecutor() as pool:
        pool.submit(server.serve_forever, 0.05)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield server
        server.shutdown()


def trace(body: dict[str, Any], runner: FakeRunner | None = None, **headers: str) -> httpx.Response:
    """Sends one request to a service with traces, and stops the service, so that all spans are sent."""
    answers: list[httpx.Response] = []

    async def check(client: httpx.AsyncClient) -> None:
        answers.append(await client.post("/generate", json=body, headers=headers))

    run(check, runner or FakeRunner(), traces="on")
    return answers[0]


def test_request_span_has_child_spans_for_queue_denoise_and_encode(collector: Collector) -> None:
    trace(WORK | {"count": 2}, **{"x-request-id": "find-me"})
    spans = {span.name: span for span in collector.spans}
    assert set(spans) == {"POST /generate", "queue", "denoise", "encode"}
    request = spans.pop("POST /generate")
    assert (request.kind, request.parent_span_id) == (SERVER, b"")
    for phase in spans.values():
        assert (phase.trace_id, phase.parent_span_id) == (request.trace_id, request.span_id)
        assert request.start_time_unix_nano <= phase.start_time_unix_nano
        assert phase.start_time_unix_nano <= phase.end_time_unix_nano <= request.end_time_unix_nano
    assert spans["queue"].end_time_unix_nano <= spans["denoise"].start_time_unix_nano + 10**6
    assert spans["denoise"].end_time_unix_nano <= spans["encode"].start_time_unix_nano + 10**6
    found = attributes(request)
    standard = {"http.request.method": "POST", "http.route": "/generate", "http.response.status_code": 200}
    own = {"unfog.request_id": "find-me", "unfog.digit": 3, "unfog.count": 2, "unfog.outcome": "ok"}
    assert standard | own == {name: found[name] for name in (*standard, *own)}
    assert collector.resource()["service.name"] == "unfog"
    assert collector.resource()["service.version"] == VERSION


def test_stream_has_one_span_per_encoding(collector: Collector) -> None:
    trace(WORK | {"count": 3}, accept="text/event-stream")
    names = [span.name for span in collector.spans]
    assert names.count("encode") >= 3
    assert names.count("POST /generate") == 1


def test_trace_of_the_caller_is_continued_and_its_ids_are_logged(
    collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    trace(WORK, traceparent=f"00-{TRACE}-{PARENT}-01")
    (request,) = [span for span in collector.spans if span.kind == SERVER]
    assert request.trace_id.hex() == TRACE
    assert request.parent_span_id.hex() == PARENT
    (line,) = [vars(record) for record in caplog.records if record.name == "unfog.access"]
    assert (line["trace_id"], line["span_id"]) == (TRACE, request.span_id.hex())


def test_no_span_is_sent_if_the_caller_does_not_sample(collector: Collector) -> None:
    assert trace(WORK, traceparent=f"00-{TRACE}-{PARENT}-00").status_code == 200
    assert not collector.spans


def test_span_of_an_expired_request_is_an_error_without_encode_span(collector: Collector) -> None:
    def slow_step(rows: Rows) -> None:
        threading.Event().wait(0.2)

    trace(WORK | {"timeout_seconds": 0.01, "num_steps": 50}, FakeRunner(on_step=slow_step))
    (request,) = [span for span in collector.spans if span.kind == SERVER]
    assert (request.status.code, request.status.message) == (ERROR, "deadline_exceeded")
    assert "encode" not in {span.name for span in collector.spans}


def test_span_of_an_invalid_request_is_not_an_error(collector: Collector) -> None:
    trace({"digit": 10})
    (request,) = collector.spans
    assert request.status.code != ERROR
    assert attributes(request)["http.response.status_code"] == 422


def test_otel_variables_set_the_resource_attributes(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "digits")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    trace(WORK)
    assert collector.resource()["service.name"] == "digits"
    assert collector.resource()["deployment.environment"] == "test"


def test_request_succeeds_if_the_collector_rejects_or_is_unreachable(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector.status = 400
    assert trace(WORK).status_code == 200
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")  # no server listens on this port
    assert trace(WORK).status_code == 200


def test_shutdown_does_not_wait_for_a_collector_that_hangs(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1000")
    monkeypatch.setattr(tracing, "FLUSH_SECONDS", 0.1)
    collector.may_respond.clear()
    service = threading.Thread(target=trace, args=(WORK,), daemon=True)
    service.start()
    service.join(10)
    is_waiting = service.is_alive()
    collector.may_respond.set()
    assert not is_waiting


def test_trace_of_a_request_without_a_valid_key_is_not_continued(collector: Collector) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        await client.post("/generate", json=WORK, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})

    run(check, FakeRunner(), traces="on", api_keys="a-key")
    (request,) = collector.spans
    assert request.trace_id.hex() != TRACE


def test_successful_probes_are_not_traced(collector: Collector) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        await client.get("/readyz")
        await client.get("/metrics")
        await client.post("/readyz")

    run(check, FakeRunner(), traces="on")
    assert [span.name for span in collector.spans] == ["POST /readyz"]


def test_no_spans_are_sent_if_traces_are_off(collector: Collector) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        await client.post("/generate", json=WORK)

    run(check, FakeRunner())
    assert not collector.exports


def test_error_without_opentelemetry_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "IMPORT_ERROR", ImportError("no module"))
    with pytest.raises(TracesError, match=r"UNFOG_TRACES=on .*pip install -e '\.\[traces\]'"):
        Traces()
