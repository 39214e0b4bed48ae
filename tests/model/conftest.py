"""A small checkpoint and what is compiled of it, for all tests of the session: compiling takes long."""

from pathlib import Path

import pytest

from tests.model.tiny_checkpoint import tiny_checkpoint


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all tests keep what they compile."""
    return tmp_path_factory.mktemp("compiled")
