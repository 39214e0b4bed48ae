"""Fixtures with an empty SQLite and PostgreSQL database."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from app.batches.database import Database
from tests.app.batches.store import Store
from tests.postgresql import PostgreSQL, postgresql

__all__ = ["postgresql"]


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """Returns an empty database of each kind."""
    url = request.getfixturevalue("postgresql").new_schema() if request.param == "postgresql" else None
    with closing(Database(tmp_path, url)) as opened:
        yield opened


@pytest.fixture
def store(database: Database) -> Store:
    return Store(database)


@pytest.fixture
def workers(postgresql: PostgreSQL, tmp_path: Path) -> Iterator[Callable[[], Store]]:
    """Returns a function that adds a worker. All of them share one PostgreSQL database."""
    url = postgresql.new_schema()
    with ExitStack() as stack:
        yield lambda: Store(stack.enter_context(closing(Database(tmp_path, url))))
