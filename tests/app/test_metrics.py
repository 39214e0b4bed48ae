import pytest
from prometheus_client import CollectorRegistry, Histogram, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from app import errors
from app.main import create_app
from app.metrics import Metrics, OneThreadHistogram
from app.settings import Settings
from tests.app.fakes import FakeRunner

# attribute of Metrics, name, type, labels
EVERY_METRIC = [
    ("requests", "unfog_requests_total", "counter", ("route", "code")),
    ("request_duration", "unfog_request_duration_seconds", "histogram", ("route",)),
    ("requests_in_progress", "unfog_requests_in_progress", "gauge", ()),
    ("images", "unfog_images_total", "counter", ("digit", "label")),
    ("queue_depth", "unfog_queue_depth_images", "gauge", ()),
    ("queue_capacity", "unfog_queue_capacity_images", "gauge", ()),
    ("running_images", "unfog_running_images", "gauge", ()),
    ("queue_wait", "unfog_queue_wait_seconds", "histogram", ()),
    ("admission_wait", "unfog_admission_wait_steps", "histogram", ()),
    ("rejected", "unfog_rejected_total", "counter", ("reason",)),
    ("cancelled", "unfog_cancelled_total", "counter", ("stage",)),
    ("denoise_steps", "unfog_denoise_steps_total", "counter", ()),
    ("step_duration", "unfog_denoise_step_duration_seconds", "histogram", ()),
    ("network", "unfog_network_seconds_total", "counter", ()),
    ("batch_rows", "unfog_batch_rows", "histogram", ()),
    ("batch_lines", "unfog_batch_lines_total", "counter", ("result",)),
    ("unfinished_batches", "unfog_unfinished_batches", "gauge", ()),
    ("encode_duration", "unfog_encode_duration_seconds", "histogram", ()),
    ("model_info", "unfog_model_info", "gauge", ("name", "sha256", "device", "dtype", "version")),
    ("log_lines_dropped", "unfog_log_lines_dropped_total", "counter", ()),
    ("ready", "unfog_ready", "gauge", ()),
    ("alive", "unfog_alive", "gauge", ()),
]


def rendered(metrics: Metrics) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(metrics.render().decode())}


def metrics_with_all_series() -> Metrics:
    """Returns metrics in which every metric with labels has one series."""
    metrics = Metrics()
    metrics.watch_dropped_log_lines(lambda: 0)
    for attribute, _, _, labels in EVERY_METRIC:
        if labels:
            getattr(metrics, attribute).labels(**dict.fromkeys(labels, "x"))
    return metrics


@pytest.mark.parametrize(("attribute", "name", "kind", "labels"), EVERY_METRIC)
def test_each_metric_has_its_name_type_and_labels(
    attribute: str, name: str, kind: str, labels: tuple[str, ...]
) -> None:
    family = rendered(metrics_with_all_series())[name.removesuffix("_total")]
    assert family.type == kind
    assert family.documentation
    assert {sample.name for sample in family.samples} == (
        {f"{name}_bucket", f"{name}_sum", f"{name}_count"} if kind == "histogram" else {name}
    )
    assert {key for sample in family.samples for key in sample.labels} - {"le"} == set(labels)


def test_no_other_metrics_exist() -> None:
    names = {name.removesuffix("_total") for _, name, _, _ in EVERY_METRIC}
    found = set(rendered(metrics_with_all_series()))
    process_metrics = {name for name in found if name.startswith("process_")}
    assert "process_resident_memory_bytes" in process_metrics
    assert found - process_metrics == names
    with_gpu = metrics_with_all_series()
    with_gpu.watch_device_memory(lambda: 12.0)
    families = rendered(with_gpu)
    assert set(families) - names - process_metrics == {"unfog_device_memory_bytes"}
    assert families["unfog_device_memory_bytes"].type == "gauge"
    assert families["unfog_device_memory_bytes"].samples[0].value == 12


def test_created_series_are_not_exposed() -> None:
    assert b"_created" not in metrics_with_all_series().render()


def test_series_of_all_reasons_and_stages_start_at_zero() -> None:
    families = rendered(Metrics())
    reasons = {sample.labels["reason"]: sample.value for sample in families["unfog_rejected"].samples}
    assert reasons == dict.fromkeys(("overloaded", "rate_limited", "draining", "deadline"), 0)
    stages = {sample.labels["stage"]: sample.value for sample in families["unfog_cancelled"].samples}
    assert stages == {"waiting": 0, "running": 0}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errors.Overloaded(1), "overloaded"),
        (errors.Draining(1), "draining"),
        (errors.DeadlineExceeded(), "deadline"),
        (errors.Starting(1), None),
        (errors.EngineFailed(1), None),
        (errors.InternalError(), None),
        (errors.MalformedJSON(), None),
    ],
)
def test_only_errors_that_reject_or_abandon_work_count_as_rejected(
    error: errors.UnfogError, reason: str | None
) -> None:
    metrics = Metrics()
    metrics.count_rejection(error)
    counts = {s.labels["reason"]: s.value for s in rendered(metrics)["unfog_rejected"].samples if s.value}
    assert counts == ({reason: 1} if reason else {})


def test_two_metrics_objects_are_independent() -> None:
    first, second = Metrics(), Metrics()
    first.denoise_steps.inc()
    assert second.registry.get_sample_value("unfog_denoise_steps_total") == 0


def test_scrape_reads_the_number_of_dropped_log_lines() -> None:
    metrics = Metrics()
    dropped = 0
    metrics.watch_dropped_log_lines(lambda: dropped)
    dropped = 7
    assert metrics.registry.get_sample_value("unfog_log_lines_dropped_total") == 7


def test_application_exposes_the_number_of_dropped_log_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.main.num_lines_dropped", lambda: 7)
    metrics: Metrics = create_app(Settings(), FakeRunner).state.service.metrics
    assert metrics.registry.get_sample_value("unfog_log_lines_dropped_total") == 7


def test_step_histogram_equals_the_histogram_of_the_library() -> None:
    bounds, values = (0.5, 1.0, 2.0), [0.1, 0.5, 0.7, 1.0, 2.0, 2.5, 1e9, 0.0]
    ours, theirs = OneThreadHistogram("unfog_x", "Text.", bounds), CollectorRegistry()
    histogram = Histogram("x", "Text.", namespace="unfog", registry=theirs, buckets=bounds)
    for value in values:
        ours.observe(value, 2)
        for _ in range(2):
            histogram.observe(value)
    registry = CollectorRegistry()
    registry.register(ours)
    assert generate_latest(registry) == generate_latest(theirs)
