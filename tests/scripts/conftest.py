"""What all tests of the scripts share."""

from collections.abc import Iterator

import pytest

from scripts.common import arguments


@pytest.fixture(scope="session", autouse=True)
def not_compiled_by_default() -> Iterator[None]:
    """Compiling takes half a minute: here it is done only where a test asks for it, or starts a process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arguments, "DEFAULT_COMPILE", "off")
        yield
