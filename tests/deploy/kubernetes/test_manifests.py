"""Validates the manifests against the schemas of Kubernetes, and tests kustomize.py. Needs no cluster."""

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.deploy.kubernetes.kustomize import FOLDER, Manifest, build, container_of, find, merged, pod_of, read

VERSIONS = ("1.30", "1.37")  # the first version that enables sleep in preStop by default, and the newest schema


@pytest.mark.parametrize("version", VERSIONS)
def test_manifests_are_valid_in_the_oldest_and_newest_version(manifests: list[Manifest], version: str) -> None:
    kinds = [manifest["kind"] for manifest in manifests]
    assert len(kinds) == len(set(kinds)) == 8
    for manifest in manifests:
        # It returns the version that it used, which is an older one if the requested schema is missing.
        assert kubernetes_validate.validate(manifest, version, strict=True) == version


@pytest.mark.parametrize(
    ("kind", "break_it"),
    [
        ("Deployment", lambda m: pod_of([m])["spec"].update(terminationGracePeriodSecond=45)),  # the final s is missing
        ("Deployment", lambda m: container_of([m])["ports"][0].update(containerPort="8000")),
        ("Deployment", lambda m: m["spec"].pop("selector")),
        ("Service", lambda m: m["spec"].update(type=["ClusterIP"])),
        ("NetworkPolicy", lambda m: m["spec"]["ingress"][0].update(form=[])),
        ("PodDisruptionBudget", lambda m: m["spec"].update(maxUnavailable=[1])),
        ("HorizontalPodAutoscaler", lambda m: m["spec"].pop("maxReplicas")),
        ("ConfigMap", lambda m: m["data"].update(UNFOG_DRAIN_TIMEOUT=25)),  # the value is a number, not a string
    ],
)
def test_invalid_field_is_detected(manifests: list[Manifest], kind: str, break_it: Callable[[Manifest], Any]) -> None:
    broken = copy.deepcopy(find(manifests, kind))
    break_it(broken)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("folder", ["base", "cpu", "gpu"])
def test_kustomization_lists_every_file_of_its_folder(folder: str) -> None:
    content = read(FOLDER / folder / "kustomization.yaml")
    paths = [entry["path"] for entry in content.get("patches", ())]
    files = [file for generator in content["configMapGenerator"] for file in generator.get("envs", ())]
    named = [*(name for name in content["resources"] if name != "../base"), *paths, *files]
    assert sorted(named) == sorted(
        path.name for path in (FOLDER / folder).iterdir() if path.name != "kustomization.yaml"
    )


def test_patch_changes_only_the_patched_fields() -> None:
    base = {"spec": {"containers": [{"name": "a", "image": "x", "args": ["1", "2"]}], "hostname": "h"}}
    patch = {"spec": {"containers": [{"name": "a", "args": ["3"]}]}}
    wanted = {"spec": {"containers": [{"name": "a", "image": "x", "args": ["3"]}], "hostname": "h"}}
    assert merged(base, patch) == wanted
    with pytest.raises(LookupError):
        find([{"kind": "Deployment", "metadata": {"name": "unfog"}}], "Deployment", "another")


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
def test_overlay_equals_the_output_of_kubectl_kustomize(overlay: str) -> None:
    output = subprocess.run(
        ["kubectl", "kustomize", FOLDER / overlay], check=True, capture_output=True, text=True
    ).stdout
    assert re.search(r"\bunfog-[a-z0-9]{10}\b", output)
    expected = list(yaml.safe_load_all(re.sub(r"\bunfog-[a-z0-9]{10}\b", "unfog", output)))
    assert ordered(expected) == ordered(build(FOLDER / overlay))


def ordered(value: Any) -> Any:
    """Returns the value with every list sorted, because kustomize puts the items of a patch first."""
    if isinstance(value, dict):
        return {key: ordered(each) for key, each in value.items()}
    if isinstance(value, list):
        return sorted(map(ordered, value), key=lambda each: json.dumps(each, sort_keys=True))
    return value
