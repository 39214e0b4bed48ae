"""Limits the memory for the bodies of requests with pictures: in total, and for each client.

If there is no room for the next bytes of a body, the body that has been stalled for the longest time is given up. It is
one of the same client if this client has used up its share, otherwise one of any client. If no body is stalled, the
request that needs room is refused.

Clients are named as in the rate limiter. Only the event loop may use this module, so it needs no lock.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from app.errors import Overloaded, RequestTimeout

SHARE = 0.5  # of the memory for a client
# A body is stalled if fewer than MIN_PROGRESS bytes have arrived in STALL_SECONDS. Single bytes do not keep it alive.
MIN_PROGRESS, STALL_SECONDS = 16 * 1024, 0.25
GIVEN_UP = "The body stopped arriving, and other requests needed its memory. Send it again"


@dataclass(eq=False, slots=True)
class Upload:
    """A body in memory. It can be given up until it has arrived completely."""

    client: str
    size: int = 0
    arrival: asyncio.Timeout = field(default_factory=lambda: asyncio.timeout(None))
    progress_at: float = 0.0
    progress_size: int = 0  # the size at that time


class UploadMemory:
    """The memory for all bodies."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._clock = limit, clock
        self.size = 0  # bytes of all bodies
        self._held: Counter[str] = Counter()  # bytes by client; a client without bytes is removed
        self._arriving: dict[Upload, None] = {}  # incomplete bodies, in the order of their last progress

    @contextmanager
    def hold(self, client: str) -> Iterator[Upload]:
        """Creates a body of this client. Its memory counts until the end of the block."""
        upload = Upload(client)
        try:
            yield upload
        finally:
            self._release(upload)

    async def receive(self, upload: Upload, read: Callable[[Callable[[int], None]], Awaitable[bytes]]) -> bytes:
        """Returns the result of `read`, which calls its argument with the size of each part of the body.

        Raises Overloaded if there is no room for a part, and RequestTimeout if the body is given up.
        """
        try:
            async with upload.arrival:
                return await read(lambda size: self._add(upload, size))
        except TimeoutError:
            raise RequestTimeout(GIVEN_UP) from None
        finally:
            self._arriving.pop(upload, None)

    def _add(self, upload: Upload, size: int) -> None:
        while self._held[upload.client] + size > SHARE * self._limit:
            self._give_up_stalled(upload.client)
        while self.size + size > self._limit:
            self._give_up_stalled()
        if upload.arrival.when() is not None:  # It was given up in this iteration of the event loop.
            raise RequestTimeout(GIVEN_UP)
        self.size += size
        self._held[upload.client] += size
        upload.size += size
        if upload not in self._arriving or upload.size - upload.progress_size >= MIN_PROGRESS:
            self._arriving.pop(upload, None)
            self._arriving[upload] = None
            upload.progress_at, upload.progress_size = self._clock(), upload.size

    def _give_up_stalled(self, client: str | None = None) -> None:
        """Gives up the body, of this client or of any, that has been stalled for the longest time.

        Raises Overloaded if none is stalled.
        """
        of_client = (each for each in self._arriving if client in (None, each.client))
        oldest = next(of_client, None)
        if not oldest or self._clock() - oldest.progress_at < STALL_SECONDS:
            raise Overloaded(1, "Too many pictures are being received. Retry later")
        del self._arriving[oldest]
        self._release(oldest)
        oldest.arrival.reschedule(0)

    def _release(self, upload: Upload) -> None:
        self.size -= upload.size
        self._held[upload.client] -= upload.size
        upload.size = 0
        if not self._held[upload.client]:
            del self._held[upload.client]
