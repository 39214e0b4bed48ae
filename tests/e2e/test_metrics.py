"""GET /metrics: names, types and labels of all metrics, and counts that match the requests."""

import re
import shutil
import subprocess
from importlib.metadata import version

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.process import wait_until
from tests.e2e.service import EVENTS, GIF, PNG, ZIP, Samples, Service

METRICS = {
    "unfog_requests": ("counter", {"route", "code"}),
    "unfog_request_duration_seconds": ("histogram", {"route"}),
    "unfog_requests_in_progress": ("gauge", set()),
    "unfog_images": ("counter", {"digit", "label"}),
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
    "unfog_batch_lines": ("counter", {"result"}),
    "unfog_unfinished_batches": ("gauge", set()),
    "unfog_encode_duration_seconds": ("histogram", set()),
    "unfog_model_info": ("gauge", {"name", "sha256", "device", "dtype", "version"}),
    "unfog_log_lines_dropped": ("counter", set()),
    "unfog_ready": ("gauge", set()),
    "unfog_alive": ("gauge", set()),
}


def scrape_after(service: Service, requests: int, before: Samples) -> Samples:
    """Waits until `requests` more requests to /generate are counted than in `before`, and returns a new scrape."""

    def counted() -> bool:
        metrics = service.metrics()
        name = "request_duration_seconds_count"
        return metrics.value(name, route="/generate") >= before.value(name, route="/generate") + requests

    wait_until(counted, f"{requests} requests are counted")
    return service.metrics()


def test_metrics_have_the_documented_names_types_and_labels(service: Service) -> None:
    service.post({"digit": 7, "num_steps": 1})
    wait_until(
        lambda: service.metrics().value("requests_total", route="/generate", code="200"), "the request is counted"
    )
    response = service.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    assert {name for name in families if not name.startswith("process_")} == set(METRICS)
    for name, (kind, labels) in METRICS.items():
        assert families[name].type == kind
        assert families[name].documentation
        assert families[name].samples
        assert {label for sample in families[name].samples for label in sample.labels} - {"le"} == labels


def test_promtool_finds_no_problem_in_the_metrics(service: Service) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("needs promtool (Debian package prometheus)")
    text = service.client.get("/metrics").text
    checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_counters_match_the_requests(service: Service) -> None:
    service.wait_until_idle()
    before = service.metrics()
    requests = [(3, 4, "application/json"), (1, 9, PNG), (5, 6, ZIP), (2, 7, EVENTS), (2, 8, GIF)]
    for count, num_steps, accept in requests:
        body = {"digit": 8, "count": count, "num_steps": num_steps, "guidance_scale": 7}
        assert service.post(body, accept).status_code == 200
    after = scrape_after(service, len(requests), before)

    def more(name: str, **labels: str) -> float:
        return after.value(name, **labels) - before.value(name, **labels)

    images = sum(count for count, _, _ in requests)
    assert more("images_total", digit="8") == images
    assert more("requests_total", route="/generate", code="200") == len(requests)
    assert more("request_duration_seconds_count", route="/generate") == len(requests)
    assert more("queue_wait_seconds_count") == more("admission_wait_steps_count") == images
    # a row is an image; the second evaluation for guidance is not counted
    assert more("batch_rows_sum") == sum(count * num_steps for count, num_steps, _ in requests)
    assert more("denoise_steps_total") == sum(num_steps for _, num_steps, _ in requests)
    assert more("denoise_step_duration_seconds_count") == more("batch_rows_count") == more("denoise_steps_total")
    assert more("encode_duration_seconds_count") >= len(requests)
    assert more("cancelled_total", stage="waiting") == more("cancelled_total", stage="running") == 0


def test_gauges_of_an_idle_service_have_the_expected_values(service: Service) -> None:
    service.wait_until_idle()
    metrics = service.metrics()
    assert metrics.value("queue_capacity_images") == 1024
    assert metrics.value("requests_in_progress") == 1  # the scrape is also a request
    assert metrics.value("ready") == 1


def test_model_info_matches_health(service: Service) -> None:
    health = service.client.get("/health").json()
    labels = {
        "name": "default",
        "sha256": health["model"]["sha256"],
        "device": health["device"],
        "dtype": health["dtype"],
        "version": version("unfog"),
    }
    assert service.metrics().value("model_info", **labels) == 1


def test_errors_are_counted_by_route_and_code_with_one_route_for_unknown_paths(service: Service) -> None:
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
        assert after.value("requests_total", **labels) - before.value("requests_total", **labels) == count, labels
    routes = {value for _, labels in after for name, value in labels if name == "route"}
    assert all(re.fullmatch(r"other|(/v[12])?(/[a-z./{}_-]*)?", route) for route in routes), routes


def test_rejection_counters_exist_for_every_reason_from_the_start(service: Service) -> None:
    names = {labels for name, labels in service.metrics() if name == "unfog_rejected_total"}
    assert {reason for labels in names for _, reason in labels} == {
        "overloaded",
        "rate_limited",
        "draining",
        "deadline",
    }
