"""The service of files and batches, as the routes use it: its parts, and the start and the stop of its workers."""

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from app.batches.batches import Batches
from app.batches.database import Database
from app.batches.files import Files
from app.errors import Overloaded

MOST_UPLOADS, MOST_OF_CLIENT = 32, 8  # at the same time; each needs up to 3 MB of memory
MOST_ARCHIVES = 4  # at the same time; each needs temporary files
UPLOAD_SECONDS, ARCHIVE_SECONDS = 5, 30  # Retry-After beyond these numbers


class Worker(Protocol):
    """A task in the event loop that does the work that is in the database."""

    async def run(self) -> None:
        """Works until it is cancelled."""

    def wake(self) -> None:
        """Makes the worker read the database now."""


class BatchService:
    """Files, batches and what works on them. Files and Batches block: call their methods with `database.run`."""

    def __init__(self, database: Database, files: Files, batches: Batches) -> None:
        self.database, self.files, self.batches = database, files, batches
        self._workers: Sequence[Worker] = ()
        self._uploads = Counter[str]()  # client -> number of its uploads
        self._num_archives = 0
        self._tasks = list["asyncio.Task[None]"]()

    def start(self, *workers: Worker) -> None:
        """Starts the workers in the running event loop."""
        self._workers = workers
        self._tasks = [asyncio.create_task(worker.run()) for worker in workers]

    @contextmanager
    def one_upload(self, client: str) -> Iterator[None]:
        """Counts an upload of a client for the duration of the block. Raises Overloaded if there are too many."""
        if self._uploads.total() >= MOST_UPLOADS or self._uploads[client] >= MOST_OF_CLIENT:
            raise Overloaded(UPLOAD_SECONDS, "Too many files are being uploaded")
        self._uploads[client] += 1
        try:
            yield
        finally:
            self._uploads[client] -= 1
            self._uploads += Counter()  # removes clients without uploads

    @contextmanager
    def one_archive(self) -> Iterator[None]:
        """Counts an archive for the duration of the block. Raises Overloaded if there are too many."""
        if self._num_archives >= MOST_ARCHIVES:
            raise Overloaded(ARCHIVE_SECONDS, "Too many archives are being downloaded")
        self._num_archives += 1
        try:
            yield
        finally:
            self._num_archives -= 1

    def wake(self) -> None:
        """Makes the workers read the database now. Call it after a change."""
        for worker in self._workers:
            worker.wake()

    async def stop(self) -> None:
        """Stops the workers, which release what they have not finished, and closes the database."""
        self.batches.is_stopping.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self.database.close)
