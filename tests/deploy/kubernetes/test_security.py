"""Tests the Pod Security Standard `restricted`, API keys and the network policy."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.deploy.kubernetes.kustomize import FOLDER, Manifest, container_of, find, pod_of

VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


def violations(spec: Manifest) -> set[str]:
    """Returns the fields of a pod and its containers that violate the standard `restricted`."""
    context = spec.get("securityContext", {})
    found = {field for field in ("hostNetwork", "hostPID", "hostIPC") if spec.get(field)}
    found |= {name for volume in spec.get("volumes", ()) for name in volume.keys() - {"name"} - VOLUMES}
    found |= {name for name in ("sysctls", "appArmorProfile", "seLinuxOptions", "windowsOptions") if name in context}
    for container in [*spec["containers"], *spec.get("initContainers", ()), *spec.get("ephemeralContainers", ())]:
        found |= _violations(container, context)
    return found


def _violations(container: Manifest, pod: Manifest) -> set[str]:
    own = container.get("securityContext", {})
    both = pod | own
    added = own.get("capabilities", {}).get("add", [])
    checks = {
        "privileged": own.get("privileged", False) is False,
        "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
        "runAsNonRoot": both.get("runAsNonRoot") is True,
        "runAsUser": both.get("runAsUser") != 0,
        "seccompProfile": both.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost"),
        "capabilities": own.get("capabilities", {}).get("drop") == ["ALL"] and set(added) <= {"NET_BIND_SERVICE"},
        "procMount": own.get("procMount", "Default") == "Default",
        "hostPort": not any(port.get("hostPort") for port in container.get("ports", ())),
        "host": not any(handler.get("host") for handler in _handlers(container)),
    }
    own_only = {name for name in ("appArmorProfile", "seLinuxOptions", "windowsOptions") if name in own}
    return {name for name, is_good in checks.items() if not is_good} | own_only


def _handlers(container: Manifest) -> list[Manifest]:
    hooks = [container.get(f"{name}Probe", {}) for name in ("startup", "readiness", "liveness")]
    hooks += container.get("lifecycle", {}).values()
    return [hook[kind] for hook in hooks for kind in ("httpGet", "tcpSocket") if kind in hook]


def test_pods_are_restricted_and_the_namespace_enforces_it(manifests: list[Manifest]) -> None:
    assert violations(pod_of(manifests)["spec"]) == set()
    labels = find(manifests, "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize(
    ("field", "break_it"),
    [
        ("hostNetwork", lambda pod, c: pod.update(hostNetwork=True)),
        ("hostPath", lambda pod, c: pod["volumes"].append({"name": "x", "hostPath": {"path": "/"}})),
        ("sysctls", lambda pod, c: pod["securityContext"].update(sysctls=[{"name": "a", "value": "b"}])),
        ("privileged", lambda pod, c: c["securityContext"].update(privileged=True)),
        ("allowPrivilegeEscalation", lambda pod, c: c["securityContext"].pop("allowPrivilegeEscalation")),
        ("runAsNonRoot", lambda pod, c: c["securityContext"].update(runAsNonRoot=False)),
        ("runAsUser", lambda pod, c: pod["securityContext"].update(runAsUser=0)),
        ("seccompProfile", lambda pod, c: pod["securityContext"].pop("seccompProfile")),
        ("capabilities", lambda pod, c: c["securityContext"]["capabilities"].update(add=["SYS_ADMIN"])),
        ("capabilities", lambda pod, c: c["securityContext"].pop("capabilities")),
        ("procMount", lambda pod, c: c["securityContext"].update(procMount="Unmasked")),
        ("hostPort", lambda pod, c: c["ports"][0].update(hostPort=8000)),
        ("host", lambda pod, c: c["livenessProbe"]["httpGet"].update(host="10.0.0.1")),
        ("allowPrivilegeEscalation", lambda pod, c: pod.update(initContainers=[c | {"securityContext": {}}])),
    ],
)
def test_violation_of_the_standard_is_detected(
    manifests: list[Manifest], field: str, break_it: Callable[[Manifest, Manifest], Any]
) -> None:
    broken = copy.deepcopy(manifests)
    break_it(pod_of(broken)["spec"], container_of(broken))
    assert field in violations(pod_of(broken)["spec"])


def test_pod_has_the_user_of_the_image_and_writes_only_to_emptydirs(manifests: list[Manifest], overlay: str) -> None:
    spec, container = pod_of(manifests)["spec"], container_of(manifests)
    dockerfile = (FOLDER.parents[1] / "Dockerfile").read_text()
    user = spec["securityContext"]
    assert f"USER {user['runAsUser']}:{user['runAsGroup']}\n" in dockerfile
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    folders = {"tmp": "/tmp", "batches": "/var/lib/unfog"} | ({"kernels": "/opt/unfog/gpu"} if overlay == "gpu" else {})
    assert {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]} == folders
    assert {volume["name"] for volume in spec["volumes"]} == set(folders)
    assert all(volume["emptyDir"]["sizeLimit"] for volume in spec["volumes"])


def test_service_account_token_is_not_mounted(manifests: list[Manifest]) -> None:
    assert pod_of(manifests)["spec"]["automountServiceAccountToken"] is False
    assert find(manifests, "ServiceAccount")["automountServiceAccountToken"] is False


def test_api_keys_come_from_a_secret_that_is_not_in_the_manifests(manifests: list[Manifest]) -> None:
    (variable,) = container_of(manifests)["env"]
    reference = variable["valueFrom"]["secretKeyRef"]
    assert (variable["name"], reference["optional"]) == ("UNFOG_API_KEYS", True)
    assert "UNFOG_API_KEYS" not in find(manifests, "ConfigMap")["data"]
    assert "Secret" not in {manifest["kind"] for manifest in manifests}
    # The commands in the README must use the same secret and key.
    made = re.findall(r"create secret generic (\S+) --from-literal=(\w+)=", (FOLDER / "README.md").read_text())
    assert made == [(reference["name"], reference["key"])] * 2


def test_network_policy_admits_listed_clients_and_blocks_egress(manifests: list[Manifest]) -> None:
    policy = find(manifests, "NetworkPolicy")["spec"]
    (rule,) = policy["ingress"]
    assert sorted(policy["policyTypes"]) == ["Egress", "Ingress"]  # a type that is not listed is not restricted
    assert "egress" not in policy
    assert rule["ports"] == [{"protocol": "TCP", "port": container_of(manifests)["ports"][0]["containerPort"]}]
    assert len(rule["from"]) == 3
    for peer in rule["from"]:
        (selector,) = peer.values()
        assert selector.get("matchLabels") or selector["matchExpressions"]  # an empty selector would select all pods
