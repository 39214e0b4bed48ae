"""Compares the speed of two versions of the service on one machine.

Both services are under load all the time. They run in turns of half a second; the other service is suspended. The speed
of a shared machine changes within seconds. Short turns expose both services to the same changes, so that the ratio of
their rates varies much less than the rates.

The clients start at different times. Otherwise all images would be at the same step, and the share of guided steps in a
measurement would depend on its start.
"""

import asyncio
import itertools
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from model.files import write_json
from scripts.benchmark.clients import RequestMaker, Send, connected
from scripts.benchmark.loads import ROWS_OF_ALL, Load, version_loads
from scripts.benchmark.machine import this_machine
from scripts.benchmark.measurement import ROWS
from scripts.benchmark.report import plain_load, with_spread
from scripts.benchmark.services import Contestant, Running, all_started, this_service
from scripts.common.errors import ScriptError
from scripts.common.progress import Reporter
from scripts.evaluation.tables import as_table

Connect = Callable[[str], AbstractAsyncContextManager[Send]]  # connects clients to the service at a URL

TURN_SECONDS = 0.5
SPREAD_SECONDS = 12.0  # the clients start within this time, about the latency of an image with 64 clients
BASE, NEW = "base", "new"
COLUMNS = ("load", "unit", BASE, NEW, "ratio", "rows per step")  # explained in page.EXPLANATIONS


@dataclass(slots=True)
class _Service:
    """A running service, the seconds it has run, and the number of its answers."""

    running: Running
    connect: Connect
    seconds: float = 0.0
    answers: Counter[str] = field(default_factory=Counter)  # number of answers for each kind of request

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Lets the service run until the block ends, and counts the time."""
        with self.running.turn():
            start = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - start


@dataclass(frozen=True, slots=True)
class _Reading:
    """The counters of a service at one time."""

    seconds: float
    rows: float
    steps: float
    answers: int  # number of answers to requests for one image

    def since(self, start: "_Reading", unit: str) -> tuple[float, float]:
        """Returns the rate and the rows per step since `start`; ScriptError if nothing was counted."""
        rows, steps = self.rows - start.rows, self.steps - start.steps
        count = rows if unit == ROWS_OF_ALL else self.answers - start.answers
        if not count or not steps:
            raise ScriptError(f"A service made no progress in {self.seconds - start.seconds:.1f} s. Increase --seconds")
        return count / (self.seconds - start.seconds), rows / steps


def measure_versions(
    base: Path, settings: Mapping[str, str], num_pairs: int, seconds: float, out: Path, reporter: Reporter
) -> None:
    """Compares the version in the working folder with the version in `base`, writes the results and prints the table.

    Only the version in the working folder has the `settings`. Each version is measured for `seconds` per pair. Raises
    ScriptError if `base` is not a version of the service.
    """
    if not (base / "app").is_dir():
        raise ScriptError(f"--base {base} is not a version of the service: it has no folder app")
    rows = list[dict[str, Any]]()

    def report(row: dict[str, Any]) -> None:
        rows.append(row)
        reporter.line(f"{row['load']}, pair {row['pair'] + 1}: {row[NEW] / row[BASE]:.3f}")
        facts = {"machine": this_machine().as_json(), "seconds_in_a_pair": seconds, "settings_of_new": settings}
        write_json(out, facts | {"rows": rows})

    contestants = version(BASE, base), version(NEW, Path.cwd(), settings)
    compare_versions(*contestants, version_loads(), num_pairs, seconds, report)
    reporter.line(as_table(COLUMNS, versions_table(rows)))


def version(name: str, folder: Path, settings: Mapping[str, str] = MappingProxyType({})) -> Contestant:
    """Returns the version of the service in a folder, with further settings.

    The number of compute threads is fixed. Otherwise a suspended service would measure its pause as time in which its
    core was busy, and would use fewer threads. For the same reason, its watchdog waits for long: after a pause of ten
    seconds, on a busy machine, it would take its engine for one that hangs, and refuse requests.
    """
    service = this_service(name, folder, num_threads=str(len(os.sched_getaffinity(0))))
    return replace(service, variables={**service.variables, "UNFOG_WATCHDOG_SECONDS": "3600", **settings})


def compare_versions(
    base: Contestant,
    new: Contestant,
    loads: Mapping[Load, str],
    num_pairs: int,
    seconds: float,
    report: Callable[[dict[str, Any]], None],
    connect_new: Connect = connected,
) -> None:
    """Measures both services and calls `report` with their rates for each load and pair.

    Each service runs for `seconds` per pair. `loads` has the unit of each load's rate. `connect_new` connects the
    clients of `new`. Raises ScriptError if a request fails or if a service makes no progress.
    """
    with all_started([base, new]) as running:
        for load, unit in loads.items():
            services = [_Service(running[base.name], connected), _Service(running[new.name], connect_new)]
            asyncio.run(_pairs(services, load, unit, num_pairs, seconds, report))


def versions_table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Returns a line for each load, with medians of the rates, and median and range of the ratios."""
    lines = []
    for load, found in itertools.groupby(rows, key=lambda row: row["load"]):
        pairs = list(found)
        ratios = [row[NEW] / row[BASE] for row in pairs]
        rates = [f"{statistics.median(row[name] for row in pairs):.4g}" for name in (BASE, NEW)]
        batches = " and ".join(f"{statistics.median(row['rows_a_step'][n] for row in pairs):.0f}" for n in (0, 1))
        lines.append([plain_load(load), pairs[0]["unit"], *rates, with_spread(ratios), batches])
    return lines


async def _pairs(
    services: Sequence[_Service],
    load: Load,
    unit: str,
    num_pairs: int,
    seconds: float,
    report: Callable[[dict[str, Any]], None],
) -> None:
    async with AsyncExitStack() as stack:
        clients = []
        for service in services:
            send = await stack.enter_async_context(service.connect(service.running.url))
            for place, make_request in enumerate(load.clients):
                delay = SPREAD_SECONDS * place / len(load.clients)
                clients.append(asyncio.create_task(_client(service, send, make_request, delay)))
        try:
            await _take_turns(services, SPREAD_SECONDS, clients)
            starts = [await _read(service) for service in services]
            for pair in range(num_pairs):
                await _take_turns(services, seconds, clients)
                ends = [await _read(service) for service in services]
                found = [end.since(start, unit) for start, end in zip(starts, ends, strict=True)]
                rates = {name: rate for name, (rate, _) in zip((BASE, NEW), found, strict=True)}
                batches = [rows_a_step for _, rows_a_step in found]
                report({"load": load.name, "pair": pair, "unit": unit, **rates, "rows_a_step": batches})
                starts = ends
        finally:
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)


async def _client(service: _Service, send: Send, make_request: RequestMaker, delay: float) -> None:
    await asyncio.sleep(delay)
    for k in itertools.count():
        answer = await send(make_request(k), time.perf_counter())
        if answer.status != 200:
            raise ScriptError(f"A request of kind {answer.kind!r} was answered with status {answer.status}")
        service.answers[answer.kind] += 1


async def _take_turns(services: Sequence[_Service], seconds: float, clients: Sequence["asyncio.Task[None]"]) -> None:
    """Lets each service run for `seconds` in turns. The service that runs first alternates.

    Raises the exception of a client that failed.
    """
    first, second = services
    for k in range(max(1, round(seconds / TURN_SECONDS))):
        for service in (first, second) if k % 2 == 0 else (second, first):
            with service.turn():
                await asyncio.sleep(TURN_SECONDS)
        for client in clients:
            if client.done():
                client.result()


async def _read(service: _Service) -> _Reading:
    with service.turn():
        values = (await asyncio.to_thread(service.running.metrics)).values
    rows, steps = values.get(f"{ROWS}_sum"), values.get(f"{ROWS}_count")
    if rows is None or steps is None:
        raise ScriptError(f"GET /metrics of a service has no metric {ROWS}")
    return _Reading(service.seconds, rows, steps, service.answers["one"])
