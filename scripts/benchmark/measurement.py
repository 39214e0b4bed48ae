"""Measures services under load, from the answers to the clients and from the metrics of the services."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import product
from typing import Any

from scripts.benchmark.clients import Window, arrivals, check_answers, closed_loop, connected, open_loop
from scripts.benchmark.loads import Load, disturbed
from scripts.benchmark.report import percentile, quantile
from scripts.benchmark.services import Contestant, Metrics, Running, all_started
from scripts.benchmark.simulation import Moment
from scripts.common.errors import ScriptError

STEPS = "unfog_denoise_step_duration_seconds"
ROWS = "unfog_batch_rows"
NETWORK = "unfog_network_seconds_total"
SHARES = (50, 95, 99)
SCRAPE_SECONDS = 0.5  # time between two scrapes of the metrics in an open loop


@dataclass(frozen=True, slots=True)
class Times:
    """The durations of a measurement, in seconds."""

    window: float  # time in which requests are counted
    settle: float  # time under load before the window opens
    objective: float  # latency limit; a slower request does not count in goodput


def measure(running: Running, contestant: Contestant, load: Load, times: Times, seed: int) -> dict[str, Any]:
    """Returns the figures of a service under a load. Raises ScriptError if a request fails."""
    before, moments = running.metrics(), list[Moment]()
    begin = time.perf_counter()
    with disturbed(load.disturbance, running.url) as is_running:
        window = asyncio.run(_under(running, load, times, seed, moments if before.values else None))
        if not is_running():
            raise ScriptError(f"{load.name}: the disturbing process ended during the measurement. Run it again")
    seconds = time.perf_counter() - begin
    check_answers(window.answers, f"{contestant.name}, {load.name}")
    return {
        "contestant": contestant.name,
        "load": load.name,
        "rate": load.rate,
        "is_plain": load.is_plain and contestant.is_of_our_network,
        **_figures_of(window, times.objective),
        "answers": _raw(window),
        "moments": moments,
        **_figures_of_metrics(running.metrics(), before, seconds),
        "resident_megabytes": running.resources().megabytes,
        "ready_seconds": running.ready_seconds,
    }


def take_turns(
    contestants: Sequence[Contestant],
    loads: Sequence[Load],
    times: Times,
    repeats: Iterable[int],
    measure_machine: Callable[[], dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """Starts all services, and measures each of them under each load once per repeat.

    The order of the services rotates. `measure_machine` is called before and after each measurement, while all services
    are suspended. Its results are in the field `adjacent` of each yielded row.
    """
    with all_started(contestants) as running:
        for repeat, load in product(repeats, loads):
            first = repeat % len(contestants)
            for contestant in [*contestants[first:], *contestants[:first]]:
                before = measure_machine()
                with running[contestant.name].turn():
                    figures = measure(running[contestant.name], contestant, load, times, repeat)
                yield {"repeat": repeat, **figures, "adjacent": [before, measure_machine()]}


async def _under(running: Running, load: Load, times: Times, seed: int, moments: list[Moment] | None) -> Window:
    """Runs the load. An open loop also appends scrapes of the metrics to `moments`, unless it is None."""
    async with connected(running.url) as send, AsyncExitStack() as stack:
        if not load.make_request:
            return await closed_loop(send, load.clients, times.settle, times.window)
        if moments is not None:
            await stack.enter_async_context(_watched(running, moments))
        return await open_loop(send, load.make_request, arrivals(load.rate, seed), times.settle, times.window)


@asynccontextmanager
async def _watched(running: Running, moments: list[Moment]) -> AsyncIterator[None]:
    """Scrapes the metrics and appends them to `moments` until the block ends. Ignores scrapes that fail."""
    begin = time.perf_counter()

    async def watch() -> None:
        while True:
            with suppress(OSError, KeyError):
                values = (await asyncio.to_thread(running.metrics)).values
                at = time.perf_counter() - begin
                moments.append(Moment(at, values[f"{ROWS}_count"], values[f"{ROWS}_sum"], values[NETWORK]))
            await asyncio.sleep(SCRAPE_SECONDS)

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()


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
    """Returns kind, images, and planned, sent and answered time of each request, in seconds since the window opened."""
    return [
        [a.kind, a.images, *(round(at - window.start, 4) for at in (a.planned, a.sent, a.done))] for a in window.answers
    ]


def _figures_of_metrics(after: Metrics, before: Metrics, seconds: float) -> dict[str, Any]:
    """Returns figures of the steps between two scrapes, `seconds` apart. Empty if there were no steps or metrics."""
    grown = {name: value - before.values.get(name, 0) for name, value in after.values.items()}
    steps = grown.get(f"{ROWS}_count")
    if not steps:
        return {}
    buckets_before = before.buckets.get(STEPS, {})
    buckets = {bound: count - buckets_before.get(bound, 0) for bound, count in after.buckets[STEPS].items()}
    return {
        "rows_a_step": grown[f"{ROWS}_sum"] / steps,
        "seconds_a_step": grown[f"{STEPS}_sum"] / steps,
        "p95_of_steps": quantile(buckets, 0.95),
        "outside_network": 1 - grown[NETWORK] / seconds,
    }
