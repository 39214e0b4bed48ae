"""The measurements: a service under closed and under open loops, repeated, with what it says of itself beside."""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from scripts.benchmark.contestants import BenchError, Contestant, Running, started
from scripts.benchmark.disturbances import disturbance
from scripts.benchmark.load import Window, arrivals, closed_loop, connected, open_loop
from scripts.benchmark.loads import Load
from scripts.benchmark.machine import matrix_rate
from scripts.benchmark.report import percentile, quantile
from scripts.benchmark.simulation import Moment

STEPS = "unfog_denoise_step_duration_seconds"
ROWS = "unfog_batch_rows"
NETWORK = "unfog_network_seconds_total"
SHARES = (50, 95, 99)
LOOK_SECONDS = 0.5  # between two looks at what a service says while a load goes on


@dataclass(frozen=True, slots=True)
class Times:
    """Of a measurement, in seconds: how long its window is, and how long the load goes on before it opens."""

    window: float
    settle: float
    objective: float  # a request that takes longer counts for nothing in goodput


def measure(
    contestant: Contestant, loads: Sequence[Load], times: Times, seed: int, device: torch.device
) -> list[dict[str, Any]]:
    """A fresh start of it, then each load in turn; BenchError where a request fails.

    The device's matrix rate is taken before and after each load of this service, as it may halve in between on a
    shared machine. The others still draw for clients that have left: beside them it would be no idle machine's.
    """
    figures = []
    with started(contestant) as running:
        for load in loads:
            before = running.metrics()
            rates = [matrix_rate(device)] if before else []
            begin = time.perf_counter()
            with disturbance(load.beside, running.url) as goes_on:
                window, moments = asyncio.run(_under(running, load, times, seed, has_metrics=bool(before)))
                if not goes_on():
                    raise BenchError(f"{load.name}: what was to go on beside has ended")
            seconds = time.perf_counter() - begin
            rates += [matrix_rate(device)] if before else []
            if window.failures:
                raise BenchError(f"{contestant.name}, {load.name}: {window.failures} requests failed")
            figures.append(
                {
                    "contestant": contestant.name,
                    "load": load.name,
                    "rate": load.rate,
                    "is_plain": load.is_plain,
                    **_figures_of(window, times.objective),
                    "answers": _raw(window),
                    "moments": moments,
                    **({"matrix_rate": statistics.mean(rates)} if rates else {}),
                    **_said_by(running.metrics(), before, seconds),
                    "resident_megabytes": running.resident_megabytes(),
                    "ready_seconds": running.ready_seconds,
                }
            )
    return figures


async def _under(
    running: Running, load: Load, times: Times, seed: int, *, has_metrics: bool
) -> tuple[Window, list[Moment]]:
    moments: list[Moment] = []
    async with connected(running.url) as send, AsyncExitStack() as stack:
        if has_metrics:
            await stack.enter_async_context(_watched(running, moments))
        if load.asks:
            return await open_loop(send, load.asks, arrivals(load.rate, seed), times.settle, times.window), moments
        return await closed_loop(send, load.clients, times.settle, times.window), moments


@asynccontextmanager
async def _watched(running: Running, moments: list[Moment]) -> AsyncIterator[None]:
    """Notes what the service has done, every now and then until the block ends."""
    begin = time.perf_counter()

    async def watch() -> None:
        while True:
            said = await asyncio.to_thread(running.metrics)
            at = time.perf_counter() - begin
            moments.append(Moment(at, said[f"{ROWS}_count"], said[f"{ROWS}_sum"], said[NETWORK]))
            await asyncio.sleep(LOOK_SECONDS)

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching


def _figures_of(window: Window, objective: float) -> dict[str, Any]:
    kinds = sorted({answer.kind for answer in window.answers})
    waits = [answer.queue for answer in window.due() if answer.queue is not None]
    return {
        "images_a_second": window.images_a_second,
        "goodput": window.goodput(objective),
        "latencies": {
            kind: {f"p{share}": percentile(window.latencies(kind), share / 100) for share in SHARES}
            | {"count": len(window.latencies(kind))}
            for kind in kinds
        },
        "seconds_to_first_step": percentile(waits, 0.5) if waits else None,
    }


def _raw(window: Window) -> list[list[Any]]:
    """Each request: its kind and images, and when it was due, sent and answered, in seconds of the window."""
    return [
        [a.kind, a.images, *(round(at - window.start, 4) for at in (a.planned, a.sent, a.done))] for a in window.answers
    ]


def _said_by(after: dict[str, float], before: dict[str, float], seconds: float) -> dict[str, Any]:
    """Rows a step, seconds a step, and the share of the time outside the network; nothing of one without metrics."""
    grown = {series: value - before.get(series, 0) for series, value in after.items()}
    steps = grown.get(f"{ROWS}_count")
    if not steps:
        return {}
    buckets = {bound: grown[f'{STEPS}_bucket{{le="{bound}"}}'] for bound in _bounds(after)}
    return {
        "rows_a_step": grown[f"{ROWS}_sum"] / steps,
        "seconds_a_step": grown[f"{STEPS}_sum"] / steps,
        "p95_of_steps": quantile({float(bound): count for bound, count in buckets.items()}, 0.95),
        "outside_network": 1 - grown[NETWORK] / seconds,
    }


def _bounds(metrics: dict[str, float]) -> list[str]:
    head = f'{STEPS}_bucket{{le="'
    return [series.removeprefix(head).removesuffix('"}') for series in metrics if series.startswith(head)]
