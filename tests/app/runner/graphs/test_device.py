"""Tests of the order of the streams of CUDA. The streams are simulated."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from app.runner.graphs.device import NUM_WARM_UP, CudaDevice

Calls = list[str]


class Stream:
    """A stream that writes its calls to a list."""

    def __init__(self, name: str, calls: Calls) -> None:
        self.name, self._calls = name, calls

    def wait_stream(self, other: "Stream") -> None:
        self._calls.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Simulates CUDA. Returns the list of the calls."""
    calls: Calls = []
    selected = [Stream("current", calls)]

    @contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        before, selected[0] = selected[0], chosen
        try:
            yield
        finally:
            selected[0] = before

    @contextmanager
    def graph(graph: object, pool: object, chosen: Stream, capture_error_mode: str) -> Iterator[None]:
        calls.append(f"capture on {chosen.name}")
        yield

    cuda = SimpleNamespace(
        graph_pool_handle=tuple,
        Stream=lambda device: Stream("side", calls),
        current_stream=lambda device: selected[0],
        set_stream=lambda chosen: calls.append(f"select {chosen.name}"),
        stream=stream,
        CUDAGraph=object,
        graph=graph,
    )
    monkeypatch.setattr("app.runner.graphs.device.torch.cuda", cuda)
    return calls


def test_runs_before_a_capture_are_ordered_with_the_current_stream(calls: Calls) -> None:
    CudaDevice(torch.device("cuda")).capture(lambda: calls.append("work"))
    runs = NUM_WARM_UP * ["work"]
    before = ["side waits for current", *runs, "current waits for side"]
    assert calls == [*before, "capture on side", "work", "select current"]


def test_current_stream_waits_for_the_runs_before_a_capture_if_one_of_them_fails(calls: Calls) -> None:
    """Otherwise the inputs of the next call would be written while the failed runs still read theirs."""

    def work() -> None:
        calls.append("work")
        if calls.count("work") == 2:
            raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        CudaDevice(torch.device("cuda")).capture(work)
    assert calls == ["side waits for current", "work", "work", "current waits for side"]
