"""GET /metrics: every metric with its labels, and counts that agree with what was sent."""

import re
import shutil
import subprocess
from importlib.metadata import version

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.process import eventually
from tests.e2e.service import EVENTS, PNG, ZIP, Samples, Service

METRICS = {
    "unfog_requests": ("counter", {"route", "code"}),
    "unfog_request_duration_seconds": ("histogram", {"route"}),
    "unfog_requests_in_progress": ("gauge", set()),
    "unfog_images": ("counter", {"digit"}),
    "unfog_queue_depth_images": ("gauge", set()),
    "unfog_queue_capacity_images": ("gauge", set()),
    "unfog_running_images": ("gauge", set()),
    "unfog_queue_wait_seconds": ("histogram", set()),
    "unfog_admission_wait_steps": ("histogram", set()),
    "unfog_rejected": ("counter", {"reason"}),
    "unfog_cancelled": ("counter", {"stage"}),
    "unfog_denoise_steps": ("counter", set()),
    "unfog_denoise_step_duration_seconds": ("histogram", set()),
    "unfog_network_seconds": ("counter", set()),
    "unfog_batch_rows": ("histogram", set()),
    "unfog_encode_duration_seconds": ("histogram", set()),
    "unfog_model_info": ("gauge", {"name", "sha256", "device", "dtype", "version"}),
    "unfog_log_lines_dropped": ("counter", set()),
    "unfog_ready": ("gauge", set()),
    "unfog_alive": ("gauge", set()),
}


def scrape_after(service: Service, requests: int, before: Samples) -> Samples:
    """The scrape in which that many requests to /generate more than before have been counted."""

    def counted() -> bool:
        metrics = service.metrics()
        name = "request_duration_seconds_count"
        return metrics.of(name, route="/generate") >= before.of(name, route="/generate") + requests

    eventually(counted, f"{requests} requests are counted")
    return service.metrics()


def test_every_metric_is_there_with_its_type_and_its_labels(service: Service) -> None:
    service.post({"digit": 7, "num_steps": 1})
    eventually(lambda: service.metrics().of("requests_total", route="/generate", code="200"), "the request is counted")
    answer = service.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    assert {name for name in families if not name.startswith("process_")} == set(METRICS)
    for name, (kind, labels) in METRICS.items():
        assert families[name].type == kind
        assert families[name].documentation
        assert families[name].samples
        assert {label for sample in families[name].samples for label in sample.labels} - {"le"} == labels


def test_prometheus_own_linter_finds_nothing(service: Service) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("needs promtool, of the package prometheus")
    text = service.client.get("/metrics").text
    checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_counts_agree_with_what_was_drawn(service: Service) -> None:
    service.wait_until_idle()
    before = service.metrics()
    asked = [(3, 4, "application/json"), (1, 9, PNG), (5, 6, ZIP), (2, 7, EVENTS)]
    for count, num_steps, accept in asked:
        body = {"digit": 8, "count": count, "num_steps": num_steps, "guidance_scale": 7}
        assert service.post(body, accept).status_code == 200
    after = scrape_after(service, len(asked), before)

    def more(name: str, **labels: str) -> float:
        return after.of(name, **labels) - before.of(name, **labels)

    images = sum(count for count, _, _ in asked)
    assert more("images_total", digit="8") == images
    assert more("requests_total", route="/generate", code="200") == len(asked)
    assert more("request_duration_seconds_count", route="/generate") == len(asked)
    assert more("queue_wait_seconds_count") == more("admission_wait_steps_count") == images
    # rows are images, not the second evaluations of guidance
    assert more("batch_rows_sum") == sum(count * num_steps for count, num_steps, _ in asked)
    assert more("denoise_steps_total") == sum(num_steps for _, num_steps, _ in asked)
    assert more("denoise_step_duration_seconds_count") == more("batch_rows_count") == more("denoise_steps_total")
    assert more("encode_duration_seconds_count") >= len(asked)
    assert more("cancelled_total", stage="waiting") == more("cancelled_total", stage="running") == 0


def test_gauges_of_an_idle_service(service: Service) -> None:
    service.wait_until_idle()
    metrics = service.metrics()
    assert metrics.of("queue_capacity_images") == 1024
    assert metrics.of("requests_in_progress") == 1  # the scrape
    assert metrics.of("ready") == 1


def test_model_info_says_what_health_says(service: Service) -> None:
    health = service.client.get("/health").json()
    labels = {
        "name": "default",
        "sha256": health["model"]["sha256"],
        "device": health["device"],
        "dtype": health["dtype"],
        "version": version("unfog"),
    }
    assert service.metrics().of("model_info", **labels) == 1


def test_refused_requests_are_counted_by_route_and_code_and_strange_paths_as_one(service: Service) -> None:
    before = service.metrics()
    for path in ("/nowhere", "/nowhere/2", "/%F0%9F%90%88"):
        service.client.get(path)
    service.post({"digit": 10})
    service.post(b"{")
    service.post({"digit": 7}, "text/html")
    service.client.get("/generate")
    service.client.get("/readyz")
    after = scrape_after(service, 4, before)
    expected = {
        ("other", "404"): 3,
        ("/generate", "422"): 1,
        ("/generate", "400"): 1,
        ("/generate", "406"): 1,
        ("/generate", "405"): 1,
        ("/readyz", "200"): 1,
    }
    for (route, code), count in expected.items():
        labels = {"route": route, "code": code}
        assert after.of("requests_total", **labels) - before.of("requests_total", **labels) == count, labels
    routes = {value for _, labels in after for name, value in labels if name == "route"}
    assert all(re.fullmatch(r"other|/[a-z./{}_-]+", route) for route in routes), routes


def test_the_smallest_set_of_reasons_is_there_before_anything_was_refused(service: Service) -> None:
    names = {labels for name, labels in service.metrics() if name == "unfog_rejected_total"}
    assert {reason for labels in names for _, reason in labels} == {
        "overloaded",
        "rate_limited",
        "draining",
        "deadline",
    }
