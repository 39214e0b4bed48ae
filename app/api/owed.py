"""Answers that are owed: from the admission of a request until its response is sent or its client is gone."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class Owed:
    """Counts them; touched by the event loop alone."""

    def __init__(self) -> None:
        self._count = 0
        self._none = asyncio.Event()
        self._none.set()

    @contextmanager
    def one(self) -> Iterator[None]:
        """An answer is owed while this is open."""
        self._count += 1
        self._none.clear()
        try:
            yield
        finally:
            self._count -= 1
            if not self._count:
                self._none.set()

    async def none(self) -> None:
        """Waits until no answer is owed."""
        await self._none.wait()
