"""The chain from the service's gauge to the number of replicas, and what may end while others serve."""

import re

from app.metrics import Metrics
from app.settings import Settings
from tests.deploy.kubernetes.kustomize import EXTRAS, Manifest, container_of, find, read

QUEUE = "unfog_queue_depth_images"


def test_the_autoscaler_follows_a_gauge_that_the_service_has(manifests: list[Manifest]) -> None:
    (metric,) = find(manifests, "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert metric["type"] == "Pods"
    assert metric["pods"]["metric"] == {"name": QUEUE}
    assert f"# TYPE {QUEUE} gauge\n".encode() in Metrics().render()


def test_the_adapters_rule_makes_the_metric_of_each_pod() -> None:
    (rule,) = read(EXTRAS / "prometheus-adapter-values.yaml")["rules"]["custom"]
    labels = rule["resources"]["overrides"]
    assert labels == {"namespace": {"resource": "namespace"}, "pod": {"resource": "pod"}}
    assert re.fullmatch(rule["name"]["matches"], QUEUE)
    assert rule["name"]["as"] == QUEUE
    assert rule["seriesQuery"] == QUEUE + "{" + ",".join(f'{label}!=""' for label in labels) + "}"
    asked = rule["metricsQuery"]
    for field, value in {"Series": QUEUE, "LabelMatchers": 'namespace="n",pod=~"a|b"', "GroupBy": "pod"}.items():
        assert asked.count(f"<<.{field}>>") == 1
        asked = asked.replace(f"<<.{field}>>", value)
    assert asked == f'sum({QUEUE}{{namespace="n",pod=~"a|b"}}) by (pod)'


def test_the_autoscaler_alone_decides_about_the_number_of_replicas(manifests: list[Manifest]) -> None:
    deployment, scaler = find(manifests, "Deployment"), find(manifests, "HorizontalPodAutoscaler")["spec"]
    assert scaler["scaleTargetRef"] == {
        "apiVersion": deployment["apiVersion"],
        "kind": "Deployment",
        "name": deployment["metadata"]["name"],
    }
    assert "replicas" not in deployment["spec"]
    assert 1 <= scaler["minReplicas"] < scaler["maxReplicas"]


def test_replicas_are_added_long_before_requests_are_refused(manifests: list[Manifest], settings: Settings) -> None:
    (metric,) = find(manifests, "HorizontalPodAutoscaler")["spec"]["metrics"]
    target = metric["pods"]["target"]
    assert target["type"] == "AverageValue"
    assert settings.max_count <= int(target["averageValue"]) <= settings.queue_capacity / 8


def evictable(budget: Manifest, replicas: int) -> int:
    """How many of so many healthy replicas may be evicted at once."""
    spec = budget["spec"]
    return int(spec["maxUnavailable"]) if "maxUnavailable" in spec else replicas - int(spec["minAvailable"])


def test_a_node_can_be_drained_whatever_the_number_of_replicas_and_others_serve_on(manifests: list[Manifest]) -> None:
    budget, scaler = find(manifests, "PodDisruptionBudget"), find(manifests, "HorizontalPodAutoscaler")["spec"]
    numbers = range(scaler["minReplicas"], scaler["maxReplicas"] + 1)
    assert evictable(budget, 1) == 1
    assert all(1 <= evictable(budget, replicas) < replicas for replicas in numbers)
    assert evictable({"spec": {"minAvailable": 1}}, 1) == 0  # as it would be the other way round


def test_no_replica_is_missed_while_rolling(manifests: list[Manifest]) -> None:
    assert find(manifests, "Deployment")["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}


def test_a_process_has_whole_cores_or_one_gpu_and_memory_that_it_is_sure_of(
    manifests: list[Manifest], overlay: str
) -> None:
    requests, limits = (container_of(manifests)["resources"][name] for name in ("requests", "limits"))
    assert requests["memory"] == limits["memory"]
    if overlay == "gpu":
        assert limits["nvidia.com/gpu"] == "1"
    else:
        assert "nvidia.com/gpu" not in limits
        assert requests["cpu"] == limits["cpu"]
        assert limits["cpu"].isdecimal()  # it bounds the compute threads: neither 1500m nor 1.5
