"""Both overlays, one after the other."""

import os

import pytest

from app.settings import Settings, load_settings
from tests.deploy.kubernetes.kustomize import EXTRAS, FOLDER, Manifest, build, find, read


@pytest.fixture(params=["cpu", "gpu"])
def overlay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def manifests(overlay: str) -> list[Manifest]:
    """All that Kubernetes itself knows: of an overlay, and the autoscaler."""
    return [*build(FOLDER / overlay), read(EXTRAS / "horizontal-pod-autoscaler.yaml")]


@pytest.fixture
def settings(manifests: list[Manifest], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """What the service reads in a pod; SettingsError where it would not start."""
    for name in [name for name in os.environ if name.upper().startswith("UNFOG_")]:
        monkeypatch.delenv(name)
    for name, value in find(manifests, "ConfigMap")["data"].items():
        monkeypatch.setenv(name, value)
    return load_settings()
