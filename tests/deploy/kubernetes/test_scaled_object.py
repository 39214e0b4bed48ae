"""Tests the autoscaling by KEDA: the fields that match the other manifests, and the values of its query.

No maintained package has the schema of ScaledObject. The README says how the object was checked against it.
"""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.main import create_app
from app.settings import Settings
from tests.app.fakes import FakeRunner
from tests.deploy.kubernetes.kustomize import EXTRAS, FOLDER, Manifest, find, read
from tests.deploy.promql import TARGET, exposed, selectors

POD_LABELS = {"namespace", "pod", "container", "endpoint"}  # which the Prometheus Operator adds for a PodMonitor
WAITING, RUNNING, BATCHES = "unfog_queue_depth_images", "unfog_running_images", "unfog_unfinished_batches"


@pytest.fixture
def spec() -> dict[str, Any]:
    return read(EXTRAS / "scaled-object.yaml")["spec"]


@pytest.fixture
def trigger(spec: dict[str, Any]) -> dict[str, Any]:
    (trigger,) = spec["triggers"]
    return dict(trigger)


def test_scaled_object_has_the_target_limits_and_behavior_of_the_autoscaler(
    spec: dict[str, Any], manifests: list[Manifest]
) -> None:
    scaler = find(manifests, "HorizontalPodAutoscaler")["spec"]
    assert spec["scaleTargetRef"] == scaler["scaleTargetRef"]
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (scaler["minReplicas"], scaler["maxReplicas"])
    assert spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == scaler["behavior"]
    # Replicas have the metric, so none of them could return from 0.
    assert spec["minReplicaCount"] >= 1 and "idleReplicaCount" not in spec


def test_trigger_asks_prometheus_once_per_scrape(spec: dict[str, Any], trigger: dict[str, Any]) -> None:
    assert (trigger["type"], trigger["metricType"]) == ("prometheus", "AverageValue")
    assert all(isinstance(value, str) for value in trigger["metadata"].values())  # KEDA rejects other types
    assert re.fullmatch(r"http://[\w-]+\.monitoring\.svc:9090", trigger["metadata"]["serverAddress"])
    (scraped,) = read(EXTRAS / "pod-monitor.yaml")["spec"]["podMetricsEndpoints"]
    assert (trigger["useCachedMetrics"], f"{spec['pollingInterval']}s") == (True, scraped["interval"])


def test_missing_series_are_an_error_and_not_zero_images(trigger: dict[str, Any]) -> None:
    assert trigger["metadata"]["ignoreNullValues"] == "false"


def test_query_uses_series_and_labels_of_the_service(trigger: dict[str, Any], manifests: list[Manifest]) -> None:
    known, found = exposed(), selectors(trigger["metadata"]["query"])
    assert [name for name, _ in found] == [WAITING, RUNNING, BATCHES]
    namespace = find(manifests, "Namespace")["metadata"]["name"]
    for name, matchers in found:
        assert matchers == {"namespace": namespace}
        assert set(matchers) <= known[name] | TARGET | POD_LABELS


def test_all_series_of_the_query_exist_from_the_start() -> None:
    rendered = create_app(Settings(), FakeRunner).state.service.metrics.render().decode()
    assert set(re.findall(rf"^({WAITING}|{RUNNING}|{BATCHES}) 0\.0$", rendered, re.M)) == {WAITING, RUNNING, BATCHES}


def test_threshold_is_reached_before_the_queue_is_full_and_stands_in_the_readme(
    trigger: dict[str, Any], settings: Settings
) -> None:
    threshold = int(trigger["metadata"]["threshold"])
    assert 1 < threshold <= settings.queue_capacity / 8
    assert f"threshold of {threshold} images" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ({"a": (10, 6, 0), "b": (0, 4, 0)}, 20),  # waiting and running images of all replicas
        ({"a": (10, 6, 1), "b": (0, 4, 1)}, 10),  # while a batch is not finished, only waiting images
        ({"a": (10, 6, 3), "b": (5, 4, 0)}, 19),  # replicas with databases of their own
        ({"a": (0, 0, 0)}, 0),
        ({}, None),  # no value, so that KEDA reports an error
    ],
)
def test_query_adds_the_images_in_progress(
    trigger: dict[str, Any], images: dict[str, tuple[int, int, int]], expected: int | None, tmp_path: Path
) -> None:
    """`images` has for each pod the waiting images, the running images and the unfinished batches."""
    if (tool := shutil.which("promtool")) is None:
        pytest.skip("needs promtool (Debian package promtool or prometheus)")
    series = [
        {"series": f'{name}{{namespace="{namespace}",pod="{pod}",job="unfog/unfog"}}', "values": f"{value}x4"}
        for namespace, pods in (("unfog", images), ("other", {"a": (1000, 1000, 0)}))
        for pod, values in pods.items()
        for name, value in zip((WAITING, RUNNING, BATCHES), values, strict=True)
    ]
    samples = [] if expected is None else [{"labels": "{}", "value": expected}]
    case = {"expr": trigger["metadata"]["query"], "eval_time": "1m", "exp_samples": samples}
    path = tmp_path / "query.yml"
    path.write_text(
        yaml.safe_dump({"tests": [{"interval": "15s", "input_series": series, "promql_expr_test": [case]}]})
    )
    tested = subprocess.run([tool, "test", "rules", str(path)], capture_output=True, text=True, check=False)
    assert tested.returncode == 0, tested.stdout + tested.stderr
