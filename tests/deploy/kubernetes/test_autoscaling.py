"""Tests the autoscaler, the metric that it uses, the disruption budget and the resources of a replica."""

import re

from app.metrics import Metrics
from app.settings import Settings
from tests.compose_limits import memory_limit
from tests.deploy.kubernetes.kustomize import EXTRAS, Manifest, container_of, find, read

QUEUE = "unfog_queue_depth_images"


def test_autoscaler_uses_a_gauge_of_the_service(manifests: list[Manifest]) -> None:
    (metric,) = find(manifests, "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert metric["type"] == "Pods"
    assert metric["pods"]["metric"] == {"name": QUEUE}
    assert f"# TYPE {QUEUE} gauge\n".encode() in Metrics().render()


def test_adapter_rule_provides_the_metric_per_pod() -> None:
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


def test_only_the_autoscaler_sets_the_number_of_replicas(manifests: list[Manifest]) -> None:
    deployment, scaler = find(manifests, "Deployment"), find(manifests, "HorizontalPodAutoscaler")["spec"]
    assert scaler["scaleTargetRef"] == {
        "apiVersion": deployment["apiVersion"],
        "kind": "Deployment",
        "name": deployment["metadata"]["name"],
    }
    assert "replicas" not in deployment["spec"]
    assert 1 <= scaler["minReplicas"] < scaler["maxReplicas"]


def test_replicas_are_added_long_before_the_queue_is_full(manifests: list[Manifest], settings: Settings) -> None:
    (metric,) = find(manifests, "HorizontalPodAutoscaler")["spec"]["metrics"]
    target = metric["pods"]["target"]
    assert target["type"] == "AverageValue"
    assert settings.max_count <= int(target["averageValue"]) <= settings.queue_capacity / 8


def max_evictions(budget: Manifest, replicas: int) -> int:
    """Returns how many healthy replicas the budget allows to evict at the same time."""
    spec = budget["spec"]
    return int(spec["maxUnavailable"]) if "maxUnavailable" in spec else replicas - int(spec["minAvailable"])


def test_a_node_can_be_drained_while_other_replicas_serve(manifests: list[Manifest]) -> None:
    budget, scaler = find(manifests, "PodDisruptionBudget"), find(manifests, "HorizontalPodAutoscaler")["spec"]
    numbers = range(scaler["minReplicas"], scaler["maxReplicas"] + 1)
    assert max_evictions(budget, 1) == 1
    assert all(1 <= max_evictions(budget, replicas) < replicas for replicas in numbers)
    assert (
        max_evictions({"spec": {"minAvailable": 1}}, 1) == 0
    )  # with minAvailable, a single replica could not be evicted


def test_rolling_update_keeps_all_replicas(manifests: list[Manifest]) -> None:
    assert find(manifests, "Deployment")["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}


def test_replica_has_integer_cores_or_one_gpu_and_guaranteed_memory(manifests: list[Manifest], overlay: str) -> None:
    requests, limits = (container_of(manifests)["resources"][name] for name in ("requests", "limits"))
    assert requests["memory"] == limits["memory"]
    if overlay == "gpu":
        assert limits["memory"] == memory_limit("docker-compose.yml").replace("g", "Gi")
        assert limits["nvidia.com/gpu"] == "1"
    else:
        assert "nvidia.com/gpu" not in limits
        assert requests["cpu"] == limits["cpu"]
        assert limits["cpu"].isdecimal()  # it sets the number of compute threads, so not 1500m or 1.5
