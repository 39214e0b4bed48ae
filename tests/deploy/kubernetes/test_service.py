"""Tests that routes, ports, settings, timeouts and labels in the manifests match the service."""

from pathlib import Path

import pytest

from app import VERSION
from app.main import STOP_SECONDS, create_app
from app.server.server import LAST_ANSWERS_SECONDS
from app.settings import Settings, SettingsError, load_settings, unknown_variables
from tests.deploy.kubernetes.kustomize import EXTRAS, FOLDER, Manifest, container_of, find, pod_of, read

ROOT = Path(__file__).parents[3]
GIVE_UP_SECONDS = Settings.model_fields["give_up_seconds"].default
COMPILED_START_SECONDS = 300  # 180 s to compile for a GPU, and 120 s to load and to record CUDA graphs
PROGRESS_SECONDS = 600  # default of Kubernetes: a rollout that takes longer has failed


def test_probes_use_routes_and_port_of_the_service(manifests: list[Manifest], settings: Settings) -> None:
    container = container_of(manifests)
    paths = create_app(Settings.model_construct()).openapi()["paths"]
    asked = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {name: get["path"] for name, get in asked.items()} == {
        "startup": "/startupz",
        "readiness": "/readyz",
        "liveness": "/livez",
    }
    assert {get["path"] for get in asked.values()} <= {path for path, methods in paths.items() if "get" in methods}
    assert {get["port"] for get in asked.values()} == {"http"}
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert container["ports"] == [{"name": "http", "containerPort": settings.port}]
    assert f"UNFOG_PORT={settings.port}" in dockerfile and "UNFOG_HOST=0.0.0.0" in dockerfile


def test_every_variable_is_a_valid_setting(manifests: list[Manifest], settings: Settings, overlay: str) -> None:
    container = container_of(manifests)
    assert container["envFrom"] == [{"configMapRef": {"name": find(manifests, "ConfigMap")["metadata"]["name"]}}]
    names = {*find(manifests, "ConfigMap")["data"], *(each["name"] for each in container["env"])}
    assert names - {"TMPDIR"} <= {f"UNFOG_{field}".upper() for field in Settings.model_fields}
    assert ("TMPDIR" in names) is (overlay == "gpu")  # the service loads compiled kernels from this folder
    assert unknown_variables() == []
    assert settings.device == {"cpu": "cpu", "gpu": "cuda"}[overlay]


def test_service_links_are_disabled_because_they_break_the_start(
    manifests: list[Manifest], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kubernetes sets NAME_PORT in each pod for each Service. This overrides the variables of the image."""
    variable = f"{find(manifests, 'Service')['metadata']['name'].upper()}_PORT"
    monkeypatch.setenv(variable, "tcp://10.0.0.1:80")
    with pytest.raises(SettingsError, match=variable):
        load_settings()
    assert pod_of(manifests)["spec"]["enableServiceLinks"] is False


def test_grace_period_is_longer_than_a_complete_stop(manifests: list[Manifest], settings: Settings) -> None:
    pause = container_of(manifests)["lifecycle"]["preStop"]["sleep"]["seconds"]
    longest = pause + settings.drain_timeout + LAST_ANSWERS_SECONDS + STOP_SECONDS
    assert pod_of(manifests)["spec"]["terminationGracePeriodSeconds"] >= longest + 5
    assert settings.drain_timeout == Settings.model_fields["drain_timeout"].default


def test_liveness_restart_comes_after_the_watchdog_and_the_exit(manifests: list[Manifest], settings: Settings) -> None:
    probe = container_of(manifests)["livenessProbe"]
    soonest = probe["periodSeconds"] * (probe["failureThreshold"] - 1)
    assert soonest > max(settings.watchdog_seconds, GIVE_UP_SECONDS)
    assert settings.watchdog_seconds == Settings.model_fields["watchdog_seconds"].default


def test_startup_probe_allows_gpu_compilation_within_a_rollout(manifests: list[Manifest]) -> None:
    probe = container_of(manifests)["startupProbe"]
    assert COMPILED_START_SECONDS <= probe["periodSeconds"] * probe["failureThreshold"] < PROGRESS_SECONDS


def test_image_tag_is_this_version(manifests: list[Manifest], overlay: str) -> None:
    kind = {"cpu": "cpu", "gpu": "cuda"}[overlay]
    image = container_of(manifests)["image"]
    assert image == f"registry.example/unfog:{VERSION}-{kind}"
    assert f"docker push {image}\n" in (FOLDER / "README.md").read_text()


def test_all_selectors_match_the_pods(manifests: list[Manifest]) -> None:
    labels, spec = pod_of(manifests)["metadata"]["labels"], pod_of(manifests)["spec"]
    monitor = read(EXTRAS / "pod-monitor.yaml")
    selectors = [
        find(manifests, "Deployment")["spec"]["selector"]["matchLabels"],
        find(manifests, "Service")["spec"]["selector"],
        find(manifests, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        find(manifests, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        monitor["spec"]["selector"]["matchLabels"],
        *(each["labelSelector"]["matchLabels"] for each in spec["topologySpreadConstraints"]),
    ]
    assert len(selectors) == 7
    assert all(selector and selector.items() <= labels.items() for selector in selectors)
    assert spec["serviceAccountName"] == find(manifests, "ServiceAccount")["metadata"]["name"]
    namespaces = {each["metadata"]["namespace"] for each in [*manifests, monitor] if each["kind"] != "Namespace"}
    assert namespaces == {find(manifests, "Namespace")["metadata"]["name"]}


def test_service_and_monitor_use_the_container_port(manifests: list[Manifest]) -> None:
    port = container_of(manifests)["ports"][0]["name"]
    (served,) = find(manifests, "Service")["spec"]["ports"]
    (scraped,) = read(EXTRAS / "pod-monitor.yaml")["spec"]["podMetricsEndpoints"]
    assert (served["targetPort"], scraped["port"], scraped["path"]) == (port, port, "/metrics")
