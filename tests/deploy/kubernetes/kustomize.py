"""A small reimplementation of `kubectl kustomize`, for the fields that deploy/kubernetes uses.

Unlike kustomize, it adds no digest to the name of a generated ConfigMap.
"""

from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[3] / "deploy" / "kubernetes"
EXTRAS = FOLDER / "extras"
FIELDS = {"apiVersion", "kind", "namespace", "resources", "configMapGenerator", "patches", "images"}

Manifest = dict[str, Any]


def read(path: Path) -> Manifest:
    """Returns the document of a YAML file."""
    content = yaml.safe_load(path.read_text())
    assert isinstance(content, dict), path
    return content


def build(folder: Path) -> list[Manifest]:
    """Returns the patched manifests of the kustomization in a folder. Raises ValueError for an unsupported field."""
    content = read(folder / "kustomization.yaml")
    if unknown := content.keys() - FIELDS:
        raise ValueError(f"{folder}: unsupported fields {sorted(unknown)}. Implement them in {Path(__file__).name}")
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
    """Returns the manifest of this kind and name. Raises LookupError if there is not exactly one."""
    found = [each for each in manifests if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    if len(found) != 1:
        raise LookupError(f"found {len(found)} manifests of kind {kind} with the name {name}, expected 1")
    return found[0]


def pod_of(manifests: list[Manifest]) -> Manifest:
    """Returns the pod template of the deployment."""
    return find(manifests, "Deployment")["spec"]["template"]


def container_of(manifests: list[Manifest]) -> Manifest:
    """Returns the only container of the pod template."""
    (container,) = pod_of(manifests)["spec"]["containers"]
    return container


def merged(base: Any, patch: Any) -> Any:
    """Returns the strategic merge of two values.

    Merges maps by key and lists of named items by name. Other values of `patch` replace those of `base`.
    """
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
