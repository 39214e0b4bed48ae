"""Tests of the service of files and batches that need no worker."""

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from app.batches import service
from app.batches.database import Database
from app.batches.service import BatchService
from app.errors import Overloaded
from tests.app.batches.store import Store


@pytest.fixture
def batches(tmp_path: Path) -> Iterator[BatchService]:
    with closing(Database(tmp_path)) as database:
        store = Store(database)
        yield BatchService(database, store.files, store.batches)


def test_uploads_beyond_the_limit_are_refused_until_one_ends(
    batches: BatchService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "MOST_UPLOADS", 2)
    with batches.one_upload("a"):
        with batches.one_upload("b"), pytest.raises(Overloaded), batches.one_upload("c"):
            pass
        with pytest.raises(ZeroDivisionError), batches.one_upload("c"):
            raise ZeroDivisionError
        with batches.one_upload("c"):
            pass


def test_uploads_of_one_client_leave_room_for_those_of_others(batches: BatchService) -> None:
    with ExitStack() as stack:
        for _ in range(service.MOST_OF_CLIENT):
            stack.enter_context(batches.one_upload("a"))
        with pytest.raises(Overloaded), batches.one_upload("a"):
            pass
        with batches.one_upload("b"):
            pass


def test_archives_beyond_the_limit_are_refused_until_one_ends(batches: BatchService) -> None:
    with ExitStack() as stack:
        for _ in range(service.MOST_ARCHIVES):
            stack.enter_context(batches.one_archive())
        with pytest.raises(Overloaded), batches.one_archive():
            pass
    with batches.one_archive():
        pass
