"""Fixtures that run each test with both overlays, cpu and gpu."""

import os

import pytest

from app.settings import Settings, load_settings
from tests.deploy.kubernetes.kustomize import EXTRAS, FOLDER, Manifest, build, find, read


@pytest.fixture(params=["cpu", "gpu"])
def overlay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def manifests(overlay: str) -> list[Manifest]:
    """The manifests of an overlay and the autoscaler, without custom resources."""
    return [*build(FOLDER / overlay), read(EXTRAS / "horizontal-pod-autoscaler.yaml")]


@pytest.fixture
def settings(manifests: list[Manifest], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings of the service in a pod. Raises SettingsError if the service would not start."""
    for name in [name for name in os.environ if name.upper().startswith("UNFOG_")]:
        monkeypatch.delenv(name)
    for name, value in find(manifests, "ConfigMap")["data"].items():
        monkeypatch.setenv(name, value)
    return load_settings()
