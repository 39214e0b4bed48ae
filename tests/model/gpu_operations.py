"""Lets tests run the operations for a GPU on a CPU."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

from model import blocks, operations, unet


@contextmanager
def gpu_operations() -> Iterator[None]:
    with ExitStack() as stack:
        for module in (blocks, operations, unet):
            stack.enter_context(mock.patch.object(module, "is_on_gpu", lambda x: True))
        yield
