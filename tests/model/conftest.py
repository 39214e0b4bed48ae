"""A small checkpoint and a cache of compiled steps. All tests of a session share them, because compilation is slow."""

from pathlib import Path

import pytest

from tests.model.tiny_checkpoint import tiny_checkpoint


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder for compiled steps that all tests share."""
    return tmp_path_factory.mktemp("compiled")
