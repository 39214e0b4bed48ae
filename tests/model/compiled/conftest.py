"""A checkpoint and a cache of compiled steps. All test processes of a run share the cache."""

from pathlib import Path

import pytest

from tests.model.tiny_checkpoint import tiny_checkpoint
from tests.tiny import COMPILED


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), **COMPILED)


@pytest.fixture(scope="session")
def cache(shared_folder: Path) -> Path:
    """The folder for compiled steps that all tests share. They do not change its files."""
    folder = shared_folder / "compiled"
    folder.mkdir(exist_ok=True)
    return folder
