"""Traces, as a collector gets them over HTTP."""

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
    """Takes OTLP over HTTP, in protobuf, and keeps the spans."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.exports: list[ExportTraceServiceRequest] = []
        self.status = 200
        self.go_on = threading.Event()
        self.go_on.set()

    @property
    def spans(self) -> list[Any]:
        """All that have arrived."""
        return [
            span
            for export in self.exports
            for resource in export.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def resource(self) -> dict[str, str]:
        """What the spans are of."""
        return attributes(self.exports[0].resource_spans[0].resource)


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        assert (self.path, self.headers["content-type"]) == ("/v1/traces", "application/x-protobuf")
        self.server.exports.append(ExportTraceServiceRequest.FromString(body))
        self.server.go_on.wait()
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
    """One request to a service that traces, and its end, after which all spans have been sent."""
    answers: list[httpx.Response] = []

    async def check(client: httpx.AsyncClient) -> None:
        answers.append(await client.post("/generate", json=body, headers=headers))

    run(check, runner or FakeRunner(), traces="on")
    return answers[0]


def test_a_request_is_a_span_with_its_queue_denoising_and_encoding_within(collector: Collector) -> None:
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
    wanted = {"http.request.method": "POST", "http.route": "/generate", "http.response.status_code": 200}
    ours = {"unfog.request_id": "find-me", "unfog.digit": 3, "unfog.count": 2, "unfog.outcome": "ok"}
    assert wanted | ours == {name: found[name] for name in (*wanted, *ours)}
    assert collector.resource()["service.name"] == "unfog"
    assert collector.resource()["service.version"] == VERSION


def test_a_stream_has_a_span_for_each_encoding(collector: Collector) -> None:
    trace(WORK | {"count": 3}, accept="text/event-stream")
    names = [span.name for span in collector.spans]
    assert names.count("encode") >= 3
    assert names.count("POST /generate") == 1


def test_a_callers_trace_is_continued_and_found_in_the_log(
    collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    trace(WORK, traceparent=f"00-{TRACE}-{PARENT}-01")
    (request,) = [span for span in collector.spans if span.kind == SERVER]
    assert request.trace_id.hex() == TRACE
    assert request.parent_span_id.hex() == PARENT
    (line,) = [vars(record) for record in caplog.records if record.name == "unfog.access"]
    assert (line["trace_id"], line["span_id"]) == (TRACE, request.span_id.hex())


def test_a_caller_that_does_not_sample_is_obeyed(collector: Collector) -> None:
    assert trace(WORK, traceparent=f"00-{TRACE}-{PARENT}-00").status_code == 200
    assert not collector.spans


def test_a_failure_is_an_error_and_what_never_ran_has_only_waited(collector: Collector) -> None:
    def be_slow(rows: Rows) -> None:
        threading.Event().wait(0.2)

    trace(WORK | {"timeout_seconds": 0.01, "num_steps": 50}, FakeRunner(on_step=be_slow))
    (request,) = [span for span in collector.spans if span.kind == SERVER]
    assert (request.status.code, request.status.message) == (ERROR, "deadline_exceeded")
    assert "encode" not in {span.name for span in collector.spans}


def test_a_clients_mistake_is_no_error_of_ours(collector: Collector) -> None:
    trace({"digit": 10})
    (request,) = collector.spans
    assert request.status.code != ERROR
    assert attributes(request)["http.response.status_code"] == 422


def test_opentelemetrys_own_variables_are_obeyed(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "digits")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    trace(WORK)
    assert collector.resource()["service.name"] == "digits"
    assert collector.resource()["deployment.environment"] == "test"


def test_a_collector_that_refuses_or_is_not_there_costs_no_answer(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector.status = 400
    assert trace(WORK).status_code == 200
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")  # discard: nobody listens
    assert trace(WORK).status_code == 200


def test_a_collector_that_never_answers_does_not_hold_up_the_end(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1000")
    monkeypatch.setattr(tracing, "LAST_SPANS_SECONDS", 0.1)
    collector.go_on.clear()
    service = threading.Thread(target=trace, args=(WORK,), daemon=True)
    service.start()
    service.join(60)
    assert not service.is_alive()
    collector.go_on.set()


def test_a_strangers_trace_is_not_continued(collector: Collector) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        await client.post("/generate", json=WORK, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})

    run(check, FakeRunner(), traces="on", api_keys="a-key")
    (request,) = collector.spans
    assert request.trace_id.hex() != TRACE


def test_probes_that_are_well_are_no_traces(collector: Collector) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        await client.get("/readyz")
        await client.get("/metrics")
        await client.post("/readyz")

    run(check, FakeRunner(), traces="on")
    assert [span.name for span in collector.spans] == ["POST /readyz"]


def test_without_the_setting_nothing_is_sent(collector: Collector) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        await client.post("/generate", json=WORK)

    run(check, FakeRunner())
    assert not collector.exports


def test_without_the_extra_a_sentence_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "MISSING", ImportError("no module"))
    with pytest.raises(TracesError, match=r"UNFOG_TRACES=on .*pip install -e '\.\[traces\]'"):
        Traces()
