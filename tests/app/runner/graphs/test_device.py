"""Tests of captures: the order of the streams of CUDA, and memory pools. The streams and the pools are simulated."""

import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from app.engine.interface import OutOfMemoryError
from app.runner.device import device_errors
from app.runner.graphs.device import NUM_WARM_UP, CudaDevice

Calls = list[str]


class Stream:
    """A stream that writes its calls to a list."""

    def __init__(self, name: str, calls: Calls) -> None:
        self.name, self._calls = name, calls

    def wait_stream(self, other: "Stream") -> None:
        self._calls.append(f"{self.name} waits for {other.name}")


class Graph:
    """A graph without kernels."""


class Pools:
    """Memory pools with the rules of torch 2.13's allocator. A pool ends with its last graph.

    A capture that could not be ended stays in the allocator, so that its pool has no further capture.
    """

    def __init__(self) -> None:
        self.used, self.fails_at_end = list[int](), False  # the pool of each capture
        self._num_graphs, self._capturing = Counter[int](), set[int]()
        self._handles = count(1)

    def new_handle(self) -> int:
        return next(self._handles)

    def begin(self, pool: int, graph: Graph) -> None:
        assert pool not in self.used or self._num_graphs[pool], "use_count > 0"
        if pool in self._capturing:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.used.append(pool)
        self._num_graphs[pool] += 1
        self._capturing.add(pool)
        weakref.finalize(graph, self._num_graphs.subtract, [pool])

    def end(self, pool: int) -> None:
        if self.fails_at_end:
            raise torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture")
        self._capturing.remove(pool)


@pytest.fixture
def pools() -> Pools:
    return Pools()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, pools: Pools) -> Calls:
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
    def graph(graph: Graph, pool: int, chosen: Stream, capture_error_mode: str) -> Iterator[None]:
        pools.begin(pool, graph)
        calls.append(f"capture on {chosen.name}")
        try:
            yield
        finally:
            pools.end(pool)

    cuda = SimpleNamespace(
        graph_pool_handle=pools.new_handle,
        Stream=lambda device: Stream("side", calls),
        current_stream=lambda device: selected[0],
        set_stream=lambda chosen: calls.append(f"select {chosen.name}"),
        stream=stream,
        CUDAGraph=Graph,
        graph=graph,
        is_initialized=lambda: True,
        synchronize=lambda: None,
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


def nothing() -> None:
    pass


@pytest.mark.usefixtures("calls")
def test_graphs_share_a_pool_until_all_of_them_are_gone(pools: Pools) -> None:
    device = CudaDevice(torch.device("cuda"))
    graphs = [device.capture(nothing), device.capture(nothing)]
    graphs.pop()
    graphs.append(device.capture(nothing))
    assert len(set(pools.used)) == 1
    graphs.clear()
    graphs.append(device.capture(nothing))
    assert len(set(pools.used)) == 2


def fails_in_capture(calls: Calls) -> None:
    if calls[-1] == "capture on side":
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def test_first_error_of_a_capture_is_raised_if_its_end_fails_too(calls: Calls, pools: Pools) -> None:
    pools.fails_at_end = True
    with pytest.raises(OutOfMemoryError), device_errors():
        CudaDevice(torch.device("cuda")).capture(lambda: fails_in_capture(calls))
    assert calls[-1] == "select current"


def test_graph_can_be_captured_after_another_one_has_failed(calls: Calls, pools: Pools) -> None:
    device = CudaDevice(torch.device("cuda"))
    graphs = [device.capture(nothing)]
    for pools.fails_at_end in (False, True):
        with pytest.raises(RuntimeError, match="CUBLAS_STATUS_ALLOC_FAILED"):
            device.capture(lambda: fails_in_capture(calls))
    pools.fails_at_end = False
    graphs += [device.capture(nothing), device.capture(nothing)]
    assert len(set(pools.used)) == 2


def test_error_of_a_capture_keeps_no_memory(calls: Calls) -> None:
    """The engine repeats a step that ran out of memory with fewer rows, so the memory of the step must be free."""
    tensors: list[weakref.ref[torch.Tensor]] = []

    def work() -> None:
        tensor = torch.zeros(1)
        tensors.append(weakref.ref(tensor))
        fails_in_capture(calls)

    gc.disable()
    try:
        with suppress(RuntimeError):
            CudaDevice(torch.device("cuda")).capture(work)
        assert [tensor() for tensor in tensors] == [None] * 3
    finally:
        gc.enable()
