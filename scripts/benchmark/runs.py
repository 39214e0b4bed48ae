"""The measurements: a service under closed and under open loops, repeated, with what it says of itself beside."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.benchmark.contestants import BenchError, Contestant, Running, started
from scripts.benchmark.load import Ask, arrivals, closed_loop, connected, open_loop
from scripts.benchmark.report import Window, percentile

STEPS = "unfog_denoise_step_duration_seconds"
ROWS = "unfog_batch_rows"
SETTLE_SECONDS = 2.0  # before a window opens: queues fill, threads wake

Asks = Callable[[int], Ask]  # the k-th request of a run


@dataclass(frozen=True, slots=True)
class Load:
    """One kind of load; `rate` requests a second, or `clients` that ask one after the other."""

    name: str
    asks: Asks
    seconds: float
    clients: int = 0
    rate: float = 0.0


def measure(contestant: Contestant, loads: Sequence[Load], seed: int) -> list[dict[str, Any]]:
    """A fresh start of it, then each load in turn; BenchError where a request fails."""
    figures = []
    with started(contestant) as running:
        for load in loads:
            before = running.metrics()
            window = asyncio.run(_under(running, load, seed))
            if window.failures:
                raise BenchError(f"{contestant.name}, {load.name}: {window.failures} requests failed")
            figures.append(
                {
                    "contestant": contestant.name,
                    "load": load.name,
                    **_figures_of(window),
                    **_said_by(running.metrics(), before),
                    "resident_megabytes": running.resident_megabytes(),
                    "ready_seconds": running.ready_seconds,
                }
            )
    return figures


async def _under(running: Running, load: Load, seed: int) -> Window:
    async with connected(running.url) as send:
        begin = time.perf_counter()
        start, end = begin + SETTLE_SECONDS, begin + SETTLE_SECONDS + load.seconds
        if load.rate:
            times = arrivals(load.rate, end - begin, seed)
            return Window(start, end, tuple(await open_loop(send, load.asks, times)), due_from=start)
        answers = await closed_loop(send, load.asks, load.clients, end - begin)
        return Window(start, end, tuple(answers), due_from=begin)


def _figures_of(window: Window) -> dict[str, Any]:
    kinds = sorted({answer.kind for answer in window.answers})
    waits = [answer.queue for answer in window.answers if answer.queue is not None]
    return {
        "images_a_second": window.images_a_second,
        "latencies": {
            kind: {f"p{share}": percentile(window.latencies(kind), share / 100) for share in (50, 95, 99)}
            | {"count": len(window.latencies(kind))}
            for kind in kinds
        },
        "seconds_to_first_step": percentile(waits, 0.5) if waits else None,
    }


def _said_by(after: dict[str, float], before: dict[str, float]) -> dict[str, Any]:
    """Rows a step, and seconds a step, by the service's own metrics; nothing of one that has none."""

    def grown(series: str) -> float:
        return after[series] - before.get(series, 0)

    if f"{ROWS}_count" not in after or not grown(f"{ROWS}_count"):
        return {}
    steps = grown(f"{ROWS}_count")
    return {"rows_a_step": grown(f"{ROWS}_sum") / steps, "seconds_a_step": grown(f"{STEPS}_sum") / steps}
