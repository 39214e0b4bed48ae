"""Tests of rounded shapes, and of the number of steps that the host enqueues without waiting."""

from typing import ClassVar

import pytest
import torch

from app.runner.transfers import STEPS_AHEAD, Shapes, Transfers


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, 16), (64, 64), (65, 128)])
def test_rows_are_rounded_up_to_a_power_of_two_on_a_gpu(count: int, rows: int) -> None:
    assert Shapes(exact=False).rows(count) == rows
    assert Shapes(exact=True).rows(count) == count


@pytest.mark.parametrize(("guided", "evaluations"), [(0, 8), (1, 16), (8, 16)])
def test_all_rows_count_as_guided_on_a_gpu_if_one_row_is_guided(guided: int, evaluations: int) -> None:
    assert Shapes(exact=False).evaluations(8, guided) == evaluations
    assert Shapes(exact=True).evaluations(8, guided) == 8 + guided


class FakeEvent:
    waited_for: ClassVar[list["FakeEvent"]] = []

    def synchronize(self) -> None:
        FakeEvent.waited_for.append(self)


def test_host_waits_if_more_than_two_steps_are_enqueued(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEvent, "waited_for", [])
    transfers = Transfers(torch.device("cuda"))
    made: list[FakeEvent] = []
    monkeypatch.setattr(transfers, "_event", lambda: made.append(FakeEvent()) or made[-1])
    for _ in range(STEPS_AHEAD):
        transfers.limit_steps_ahead()
    assert FakeEvent.waited_for == []
    for _ in range(5):
        transfers.limit_steps_ahead()
    assert FakeEvent.waited_for == made[:5]


def test_transfers_do_nothing_on_a_cpu() -> None:
    transfers = Transfers(torch.device("cpu"))
    uploaded = transfers.upload([3, 1, 2])
    assert (uploaded.tolist(), uploaded.dtype) == ([3, 1, 2], torch.int64)
    assert transfers.download(uploaded) is uploaded
    transfers.limit_steps_ahead()
    transfers.wait()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_values_are_unchanged_after_upload_and_download_on_a_gpu() -> None:
    transfers = Transfers(torch.device("cuda"))
    uploaded = transfers.upload(list(range(1000)))
    assert uploaded.device.type == "cuda"
    back = transfers.download(uploaded * 2)
    assert back.device.type == "cpu"
    assert back.tolist() == list(range(0, 2000, 2))
    for _ in range(5):
        transfers.limit_steps_ahead()
    transfers.wait()
