"""What needs no GPU: the shapes, and how far the host runs ahead of events that it would wait for."""

from typing import ClassVar

import pytest
import torch

from app.runner.transfers import STEPS_AHEAD, Shapes, Transfers


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, 16), (64, 64), (65, 128)])
def test_on_a_gpu_rows_are_rounded_up_to_a_power_of_two(count: int, rows: int) -> None:
    assert Shapes(exact=False).rows(count) == rows
    assert Shapes(exact=True).rows(count) == count


@pytest.mark.parametrize(("guided", "evaluations"), [(0, 8), (1, 16), (8, 16)])
def test_on_a_gpu_none_or_all_of_a_step_are_evaluated_twice(guided: int, evaluations: int) -> None:
    assert Shapes(exact=False).evaluations(8, guided) == evaluations
    assert Shapes(exact=True).evaluations(8, guided) == 8 + guided


class FakeEvent:
    waited_for: ClassVar[list["FakeEvent"]] = []

    def synchronize(self) -> None:
        FakeEvent.waited_for.append(self)


def test_the_host_runs_so_many_steps_ahead_and_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEvent, "waited_for", [])
    transfers = Transfers(torch.device("cuda"))
    made: list[FakeEvent] = []
    monkeypatch.setattr(transfers, "_event", lambda: made.append(FakeEvent()) or made[-1])
    for _ in range(STEPS_AHEAD):
        transfers.note_step()
    assert FakeEvent.waited_for == []
    for _ in range(5):
        transfers.note_step()
    assert FakeEvent.waited_for == made[:5]


def test_on_a_cpu_nothing_is_copied_or_waited_for() -> None:
    transfers = Transfers(torch.device("cpu"))
    uploaded = transfers.upload([3, 1, 2])
    assert (uploaded.tolist(), uploaded.dtype) == ([3, 1, 2], torch.int64)
    assert transfers.download(uploaded) is uploaded
    transfers.note_step()
    transfers.wait()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_values_come_back_as_they_went() -> None:
    transfers = Transfers(torch.device("cuda"))
    uploaded = transfers.upload(list(range(1000)))
    assert uploaded.device.type == "cuda"
    back = transfers.download(uploaded * 2)
    assert back.device.type == "cpu"
    assert back.tolist() == list(range(0, 2000, 2))
    for _ in range(5):
        transfers.note_step()
    transfers.wait()
