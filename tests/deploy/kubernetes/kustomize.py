"""What `kubectl kustomize` makes of a folder, for the few fields that deploy/kubernetes uses; more are an error.

One thing is left out: the digest that it adds to the name of a generated ConfigMap.
"""

from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[3] / "deploy" / "kubernetes"
EXTRAS = FOLDER / "extras"
FIELDS = {"apiVersion", "kind", "namespace", "resources", "configMapGenerator", "patches", "images"}

Manifest = dict[str, Any]


def read(path: Path) -> Manifest:
    """The one document of a YAML file."""
    content = yaml.safe_load(path.read_text())
    assert isinstance(content, dict), path
    return content


def build(folder: Path) -> list[Manifest]:
    """The manifests of its kustomization, patched."""
    content = read(folder / "kustomization.yaml")
    if unknown := content.keys() - FIELDS:
        raise ValueError(f"{folder}: this merge does not know {sorted(unknown)}, of which it would say nothing")
    manifests: list[Manifest] = []
    for name in content["resources"]:
        manifests += build(folder / name) if (folder / name).is_dir() else [read(folder / name)]
    for generator in content.get("configMapGenerator", ()):
        _generate(manifests, folder, **generator)
    for entry in content.get("patches", ()):
        (path,) = entry.values()
        patch = read(folder / path)
        target = find(manifests, patch["kind"], patch["metadata"]["name"])
        target.update(merged(target, patch))
    for image in content.get("images", ()):
        _name_image(manifests, **image)
    if namespace := content.get("namespace"):
        for manifest in manifests:
            manifest["metadata"]["name" if manifest["kind"] == "Namespace" else "namespace"] = namespace
    return manifests


def find(manifests: list[Manifest], kind: str, name: str = "unfog") -> Manifest:
    """The one of this kind and name; LookupError where there is none, or more."""
    found = [each for each in manifests if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    if len(found) != 1:
        raise LookupError(f"{len(found)} {kind} {name}")
    return found[0]


def pod_of(manifests: list[Manifest]) -> Manifest:
    """The template of the deployment's pods."""
    return find(manifests, "Deployment")["spec"]["template"]


def container_of(manifests: list[Manifest]) -> Manifest:
    """The only container of a pod."""
    (container,) = pod_of(manifests)["spec"]["containers"]
    return container


def merged(base: Any, patch: Any) -> Any:
    """A strategic merge: maps by key, lists of what has a name by that, anything else replaced."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return base | {key: merged(base.get(key), value) for key, value in patch.items()}
    if _are_named(base) and _are_named(patch):
        by_name = {item["name"]: item for item in base}
        for item in patch:
            by_name[item["name"]] = merged(by_name.get(item["name"]), item)
        return list(by_name.values())
    return patch


def _are_named(items: Any) -> bool:
    return isinstance(items, list) and bool(items) and all(isinstance(each, dict) and "name" in each for each in items)


def _generate(
    manifests: list[Manifest],
    folder: Path,
    name: str,
    behavior: str = "create",
    envs: tuple[str, ...] = (),
    literals: tuple[str, ...] = (),
) -> None:
    lines = [line for file in envs for line in (folder / file).read_text().splitlines()]
    pairs = [line for line in lines if line and not line.startswith("#")] + list(literals)
    data = dict(pair.split("=", 1) for pair in pairs)
    if behavior == "merge":
        find(manifests, "ConfigMap", name)["data"].update(data)
    else:
        assert behavior == "create"
        manifests.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data})


def _name_image(manifests: list[Manifest], name: str, newName: str, newTag: str) -> None:
    for manifest in manifests:
        if manifest["kind"] == "Deployment":
            for container in manifest["spec"]["template"]["spec"]["containers"]:
                if container["image"] == name:
                    container["image"] = f"{newName}:{newTag}"
