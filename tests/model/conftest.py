"""A small checkpoint that the tests of `model` share."""

from pathlib import Path

import pytest

from tests.model.tiny_checkpoint import tiny_checkpoint


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))
