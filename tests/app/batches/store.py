"""The files and batches of one database, with short forms of what the tests do with them."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy as sa

from app.batches.batches import ActiveBatch, Batches, StoredCounts
from app.batches.database import Database
from app.batches.files import CHUNK_BYTES, Files, Limits
from app.batches.rates import Rates
from app.batches.records import Batch, File, Line, LineAnswer, NewBatch
from app.batches.tables import batches, lines, webhooks
from app.errors import FieldError

OWNER, OTHER = "a" * 32, "b" * 32
ENDPOINT, OTHER_ENDPOINT = "/v1/images/generations", "/v1/generate"
HOOK, BAD_HOOK = "https://example.org/hook", "http://localhost/hook"
LIMITS = Limits(files=100, file_bytes=50_000_000, stored_bytes=500_000_000, lines=5000, lifetime=86_400)


def line_of(custom_id: str, *, url: str = ENDPOINT, **body: Any) -> bytes:
    """Returns a line of an input file, with a newline."""
    line = {"custom_id": custom_id, "method": "POST", "url": url, "body": body}
    return json.dumps(line).encode() + b"\n"


def content_of(num_lines: int, **body: Any) -> bytes:
    """Returns an input file whose lines have the custom_ids c1, c2 and so on."""
    return b"".join(line_of(f"c{number}", **body) for number in range(1, num_lines + 1))


class Store:
    """A worker with its files and batches."""

    def __init__(self, database: Database, limits: Limits = LIMITS) -> None:
        self.database, self.rates = database, Rates()
        self.files = Files(database, limits)
        self.batches = Batches(database, limits, {ENDPOINT, OTHER_ENDPOINT}, check_hook, self.rates)

    def upload(self, content: bytes, owner: str = OWNER, lifetime: int | None = None) -> File:
        """Uploads a file in chunks of CHUNK_BYTES."""
        upload = self.files.begin(owner, "requests.jsonl")
        for start in range(0, len(content), CHUNK_BYTES):
            upload.add(content[start : start + CHUNK_BYTES])
        return upload.finish(lifetime)

    def create(self, content: bytes | int, owner: str = OWNER, **fields: Any) -> Batch:
        """Creates a batch with this file, or with a file of so many lines."""
        file = self.upload(content_of(content) if isinstance(content, int) else content, owner)
        return self.batches.create(owner, NewBatch(file.id, ENDPOINT, **fields))

    def start(self, content: bytes | int, owner: str = OWNER, **fields: Any) -> Batch:
        """Creates and validates a batch."""
        batch = self.create(content, owner, **fields)
        assert self.batches.validate(batch.id)
        return self.batches.get(owner, batch.id)

    def get(self, batch: Batch) -> Batch:
        return self.batches.get(batch.owner, batch.id)

    def take(self, batch: Batch, count: int = 1000) -> Sequence[Line]:
        return self.batches.take(ActiveBatch(batch.id, batch.endpoint, batch.status, is_expired=False), count)

    def answer(self, taken: Iterable[Line], status: int = 200, images: int = 1) -> StoredCounts:
        """Stores the same answer to all lines."""
        answer = LineAnswer(status, "req_1", b'{"status": %d}' % status, images, 4)
        return self.batches.store([(line, answer) for line in taken])

    def finish(self, batch: Batch) -> Batch:
        """Answers all lines of a batch."""
        self.answer(self.take(batch))
        assert self.batches.end_if_done(batch.id)
        return self.get(batch)

    def read(self, file_id: str | None, owner: str = OWNER) -> bytes:
        """Returns the content of a file."""
        assert file_id
        return b"".join(self.files.content(owner, file_id))

    def results(self, file_id: str | None) -> list[Any]:
        """Returns the lines of an output or error file. Its size must be that of its description."""
        assert file_id
        content = self.read(file_id)
        assert len(content) == self.files.get(OWNER, file_id).bytes
        return [json.loads(line) for line in content.splitlines()]

    def set_batch(self, batch: Batch, **values: Any) -> None:
        """Changes columns of a batch."""
        with self.database.write() as connection:
            connection.execute(batches.update().where(batches.c.id == batch.id).values(**values))

    def rows(self, table: sa.Table) -> Sequence[sa.Row[Any]]:
        with self.database.read() as connection:
            return connection.execute(sa.select(table)).all()

    def num_lines(self) -> int:
        return len(self.rows(lines))

    def events(self) -> list[tuple[str, str]]:
        """Returns the batch and the event of each webhook that is to be sent."""
        return [(row.batch_id, row.event) for row in self.rows(webhooks)]


def check_hook(url: str) -> None:
    """Refuses BAD_HOOK."""
    if url == BAD_HOOK:
        raise FieldError("webhook_url", "not permitted")
