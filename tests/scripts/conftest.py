"""Fixtures for all tests of the scripts."""

from collections.abc import Iterator

import pytest

from scripts.common import arguments


@pytest.fixture(scope="session", autouse=True)
def not_compiled_by_default() -> Iterator[None]:
    """Sets --compile off by default, because compilation takes half a minute. Subprocesses are not affected."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arguments, "DEFAULT_COMPILE", "off")
        yield
