"""Tests of the service of files and batches that need no worker."""

from pathlib import Path

import pytest

from app.batches import service
from app.batches.database import Database
from app.batches.service import BatchService
from app.errors import Overloaded
from tests.app.batches.store import Store


def test_uploads_beyond_the_limit_are_refused_until_one_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MOST_UPLOADS", 2)
    store = Store(Database(tmp_path))
    batches = BatchService(store.database, store.files, store.batches)
    with batches.one_upload():
        with batches.one_upload(), pytest.raises(Overloaded), batches.one_upload():
            pass
        with pytest.raises(ZeroDivisionError), batches.one_upload():
            raise ZeroDivisionError
        with batches.one_upload():
            pass
    store.database.close()
