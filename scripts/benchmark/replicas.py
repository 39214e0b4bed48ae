"""Measures two replicas behind HAProxy, and compares the latencies with those of a simulation of the same arrivals.

Each replica has one thread and a core of its own. HAProxy and the clients run on the same two cores.

The simulation gets measured inputs, and none of the measured latencies. Closed loops before, between and after the
measurements give the step time for several numbers of rows, the time by which a request makes steps longer, the time
that a request spends outside of the engine, and the capacity, from which the rates of the arrivals follow. The means of
all loops are used. In a closed loop, a step and the requests that end in it take the time

    T(rows, steps) = step(rows) + request * rows / steps    where

    rows     mean number of rows of a step
    steps    steps of an image, so that rows / steps requests begin and end in each step

Two loops with different `steps` give `request`, and the loops with different numbers of clients then give `step(rows)`.

On a virtual machine, the speed of a core changes by tens of percent for seconds, and nothing can predict this. The pace
of each replica in each second of a measurement is therefore an input too. It is computed from the durations of steps.
"""

import asyncio
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from app.engine.job import JobRequest, Options
from model.files import write_json
from scripts.benchmark.clients import (
    RequestMaker,
    RequestSpec,
    Send,
    arrivals,
    check_answers,
    connected,
    open_loop,
)
from scripts.benchmark.cluster_simulation import PERCENTILES, Arrival, Cluster, Pace, ReplicaModel, percentiles_of
from scripts.benchmark.http_client import fetch
from scripts.benchmark.loads import UNGUIDED
from scripts.benchmark.machine import this_machine
from scripts.benchmark.measurement import ROWS, STEPS
from scripts.benchmark.report import with_spread
from scripts.benchmark.routers import least_connections
from scripts.benchmark.services import Running, free_port, started, this_service
from scripts.benchmark.sizes import measure_sizes
from scripts.common.errors import ScriptError
from scripts.common.progress import Reporter, require
from scripts.evaluation.tables import as_table

NUM_REPLICAS = 2
SHARES = (0.5, 0.7, 0.9)  # of the capacity
NUM_STEPS, FEW_STEPS = 20, 4  # of an image; FEW_STEPS only in the loop that measures the time of a request
MAX_BATCH = 32
CLIENTS = (1, 2, 4, 8, 16, 32)  # per replica, in the loops that measure step times; the last one is the capacity
FEW_STEPS_CLIENTS = 4  # per replica
SETTLE_SECONDS = 5.0  # of arrivals before the window of a measurement
LOOP_SETTLE_SECONDS = 1.0  # of a closed loop
PART_SECONDS = 1.0  # of a measurement, in each of which the pace is measured; more scrapes would slow down the replicas
COLUMNS = ("share of the capacity", "requests/s", "requests", "percentile", "measured, s", "simulated, s", "error")
HAPROXY = """
global
    maxconn 4000
    nbthread 1
defaults
    mode http
    option http-server-close
    timeout connect 5s
    timeout client 700s
    timeout server 700s
frontend service
    bind 127.0.0.1:{port}
    default_backend replicas
backend replicas
    balance leastconn
{servers}
"""


class Counters(NamedTuple):
    """What a replica has counted so far, or in some time."""

    seconds: float  # that have passed
    steps: float
    rows: float  # of all steps
    step_seconds: float  # of all steps


class Loop(NamedTuple):
    """The means of a closed loop over both replicas."""

    rows: float  # of a step
    seconds: float  # from the beginning of a step to that of the next one
    step_seconds: float  # of a step, as the metrics of the service have it
    delay_seconds: float  # of a request outside of the engine


class Loops(NamedTuple):
    """Closed loops that were measured one after the other."""

    of_clients: Mapping[int, Loop]  # by number of clients per replica
    few_steps: Loop  # FEW_STEPS_CLIENTS clients whose images take FEW_STEPS steps

    @classmethod
    def mean(cls, measured: "Sequence[Loops]") -> "Loops":
        """Returns the means of loops that were measured several times."""

        def of(loops: Iterable[Loop]) -> Loop:
            return Loop(*np.mean(list(loops), axis=0).tolist())

        of_clients = {count: of(loops.of_clients[count] for loops in measured) for count in measured[0].of_clients}
        return cls(of_clients, of(loops.few_steps for loops in measured))


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the simulation gets. It is measured in closed loops."""

    seconds_by_rows: dict[int, float]  # of a step, without the time for requests
    request_seconds: float
    delay_seconds: float
    capacity: float  # requests a second of both replicas together
    usual: dict[int, float]  # seconds of a step by its number of rows, as the metrics of the service have it

    @classmethod
    def of(cls, loops: Loops) -> "Inputs":
        """Raises ScriptError if a result is not positive."""
        of_clients, few_steps = loops
        rows, seconds, step_seconds, delays = map(list, zip(*of_clients.values(), strict=True))
        # A single client leaves the replica idle between two requests, when nothing else makes steps longer.
        seconds[0] -= delays[0] / NUM_STEPS
        with_many = float(np.interp(few_steps.rows, rows, seconds))
        request = (few_steps.seconds - with_many) / (few_steps.rows * (1 / FEW_STEPS - 1 / NUM_STEPS))
        # A step has fewer rows than there are clients, because a client is sometimes between two requests. The largest
        # number of rows is extrapolated: its step takes longer in proportion.
        largest, scale = max(of_clients), max(of_clients) / rows[-1]
        found = {count: float(np.interp(count, rows, seconds)) for count in of_clients} | {largest: scale * seconds[-1]}
        steps = {count: time - (count > 1) * request * count / NUM_STEPS for count, time in found.items()}
        if min(request, *steps.values()) <= 0:
            raise ScriptError(
                "A measured time is not positive: other programs use this machine. Stop them and try again"
            )
        usual = {count: float(np.interp(count, rows, step_seconds)) for count in of_clients}
        usual[largest] = scale * step_seconds[-1]
        return cls(steps, request, statistics.mean(delays), NUM_REPLICAS * rows[-1] / seconds[-1] / NUM_STEPS, usual)

    def model(self) -> ReplicaModel:
        """Returns the simulated replica."""
        return ReplicaModel(self.seconds_by_rows, self.request_seconds, self.delay_seconds, MAX_BATCH)

    def paces(self, parts: Sequence[Sequence[Counters]]) -> list[Pace]:
        """Returns the pace of each replica. `parts` has what each replica has counted in each part of a measurement.

        The pace of a part is the ratio of the time of its steps to the usual time of steps with as many rows. It is 1
        in a part without steps.
        """
        counts = np.array(parts)  # [part, replica, counter]
        _, steps, rows, step_seconds = np.moveaxis(counts, -1, 0)  # each [part, replica]
        usual = steps * np.interp(rows / np.maximum(steps, 1), list(self.usual), list(self.usual.values()))
        factors = np.where(steps > 0, step_seconds / np.where(steps > 0, usual, 1), 1.0)
        return [Pace(PART_SECONDS, of_replica.tolist()) for of_replica in factors.T]


@dataclass(frozen=True, slots=True)
class Replicas:
    """The running replicas, and HAProxy in front of them."""

    url: str
    replicas: Sequence[Running]
    haproxy: int  # process id

    def used_seconds(self) -> dict[str, float]:
        """Returns the processor time that each part has used so far."""
        psutil = require("psutil", extra="bench")

        def of(pid: int) -> float:
            times = psutil.Process(pid).cpu_times()
            return float(times.user + times.system)

        return {
            "clients": time.process_time(),
            "HAProxy": of(self.haproxy),
            "replicas": sum(of(replica.pid) for replica in self.replicas),
        }


def measure_replicas(repeats: int, seconds: float, loop_seconds: float, out: Path, reporter: Reporter) -> None:
    """Measures each share of the capacity once per repeat, writes the results and prints the table.

    Raises ScriptError if HAProxy is not installed, if the machine has fewer than two cores, or if a request fails.
    """
    rows, parts = list[dict[str, Any]](), list[Parts]()
    with all_replicas() as replicas:
        facts = {"machine": this_machine().as_json(), "seconds": seconds, "loop_seconds": loop_seconds}
        facts |= {"compiled": _health(replicas)["compiled"], "num_steps": NUM_STEPS, "max_batch": MAX_BATCH}
        facts["sizes"] = measure_sizes(replicas.url, {"num_steps": NUM_STEPS, "sampler": "dpmpp"})
        loops = [measure_loops(replicas, loop_seconds)]
        capacity = Inputs.of(loops[0]).capacity
        for repeat in range(repeats):
            first = repeat % len(SHARES)
            for share in (*SHARES[first:], *SHARES[:first]):
                row, counted = _measure(replicas, share * capacity, len(rows), seconds)
                rows.append({"repeat": repeat, "share": share, **row})
                parts.append(counted)
                loops.append(measure_loops(replicas, loop_seconds))
                reporter.line(_summary(rows[-1]))
    inputs = Inputs.of(Loops.mean(loops))
    for seed, (row, counted) in enumerate(zip(rows, parts, strict=True)):
        row["paces"] = [pace.factors for pace in inputs.paces(counted)]
        row["simulated"] = simulate(inputs, row, seed, seconds)
    write_json(out, {**facts, "inputs": asdict(inputs), "rows": rows})
    reporter.line(as_table(COLUMNS, table_of(rows)))


def table_of(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Returns a line for each share and percentile, with medians and ranges over the repeats."""
    table = []
    for share in SHARES:
        of_share = [row for row in rows if row["share"] == share]
        for name in (f"p{each}" for each in PERCENTILES):
            measured, simulated = ([row[kind][name] for row in of_share] for kind in ("measured", "simulated"))
            rates, numbers = ([row[kind] for row in of_share] for kind in ("rate", "requests"))
            errors = [f"{error:+.0%}" for error in _spread(errors_of(of_share, name))]
            table.append(
                [
                    f"{share:g}",
                    f"{statistics.median(rates):.1f}",
                    f"{sum(numbers)}",
                    name,
                    with_spread(measured),
                    with_spread(simulated),
                    f"{errors[0]} ({errors[1]} - {errors[2]})",
                ]
            )
    return table


def errors_of(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Returns the relative error of the simulated percentile of each row."""
    return [row["simulated"][name] / row["measured"][name] - 1 for row in rows]


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


@contextmanager
def all_replicas() -> Iterator[Replicas]:
    """Runs the replicas, each on its own core, and HAProxy until the block ends."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < NUM_REPLICAS:
        raise ScriptError(f"This machine has {len(cores)} cores. Measure on one with at least {NUM_REPLICAS}")
    if not shutil.which("haproxy"):
        raise ScriptError("HAProxy is not installed. Install it, on Debian with: apt install haproxy")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        replicas = list[Running]()
        for core in cores[:NUM_REPLICAS]:
            data_dir, most = f"{folder / str(core)}", f"{MAX_BATCH}"
            service = this_service(f"replica {core}", num_threads="1", max_batch=most, data_dir=data_dir, clip="off")
            with _pinned_to(core):
                replicas.append(stack.enter_context(started(service)))
        port = free_port()
        servers = "\n".join(
            f"    server replica{place} {replica.url.removeprefix('http://')}" for place, replica in enumerate(replicas)
        )
        config = folder / "haproxy.cfg"
        config.write_text(HAPROXY.format(port=port, servers=servers))
        haproxy = stack.enter_context(subprocess.Popen(["haproxy", "-db", "-q", "-f", str(config)]))
        stack.callback(haproxy.terminate)
        url = f"http://127.0.0.1:{port}"
        _wait_until(lambda: fetch(f"{url}/readyz"), haproxy)
        yield Replicas(url, replicas, haproxy.pid)


@contextmanager
def _pinned_to(core: int) -> Iterator[None]:
    """Runs this process on one core until the block ends. The processes that it starts stay there."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _wait_until(works: Callable[[], object], process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + 10
    while process.poll() is None and time.monotonic() < end:
        try:
            works()
            return
        except OSError:
            time.sleep(0.05)
    raise ScriptError("HAProxy did not start. Its message is above")


def _health(replicas: Replicas) -> dict[str, Any]:
    health: dict[str, Any] = json.loads(fetch(f"{replicas.url}/health"))
    return health


def measure_loops(replicas: Replicas, seconds: float) -> Loops:
    """Measures closed loops, each for `seconds`."""
    of_clients = {clients: asyncio.run(_loop(replicas, clients, NUM_STEPS, seconds)) for clients in CLIENTS}
    return Loops(of_clients, asyncio.run(_loop(replicas, FEW_STEPS_CLIENTS, FEW_STEPS, seconds)))


async def _loop(replicas: Replicas, clients: int, num_steps: int, seconds: float) -> Loop:
    """Runs a closed loop with this number of clients per replica, and compares two scrapes of the metrics.

    The clients start at equal intervals. If they started together, their requests would end in the same steps.
    """
    is_over, total, delays = False, NUM_REPLICAS * clients, list[float]()

    async def client(send: Send, place: int) -> None:
        make_request = request_of(num_steps)
        await asyncio.sleep(LOOP_SETTLE_SECONDS * place / total)
        while not is_over:
            answer = await send(make_request(place), time.perf_counter())
            check_answers([answer], f"closed loop of {clients} clients per replica")
            delays.append(answer.latency - (answer.queue or 0.0) - (answer.work or 0.0))

    async with connected(replicas.url) as send, asyncio.TaskGroup() as group:
        for place in range(total):
            group.create_task(client(send, place))
        await asyncio.sleep(2 * LOOP_SETTLE_SECONDS)
        before = await _all_counters(replicas)
        await asyncio.sleep(seconds)
        after = await _all_counters(replicas)
        is_over = True
    took, steps, rows, step_seconds = np.sum(np.subtract(after, before), axis=0).tolist()
    return Loop(rows / steps, took / steps, step_seconds / steps, statistics.mean(delays))


async def _all_counters(replicas: Replicas) -> list[Counters]:
    return await asyncio.to_thread(lambda: [_counters(replica) for replica in replicas.replicas])


def _counters(replica: Running) -> Counters:
    values = replica.metrics().values
    return Counters(time.perf_counter(), values[f"{ROWS}_count"], values[f"{ROWS}_sum"], values[f"{STEPS}_sum"])


def request_of(num_steps: int) -> RequestMaker:
    """Returns the requests for one image in this number of steps."""
    fields = {**UNGUIDED, "sampler": "dpmpp", "num_steps": num_steps}
    return lambda k: RequestSpec("one", {**fields, "digit": k % 10, "seed": k})


Parts = list[list[Counters]]  # what each replica has counted in each part of a measurement


def _measure(replicas: Replicas, rate: float, seed: int, seconds: float) -> tuple[dict[str, Any], Parts]:
    """Returns the latencies of random arrivals and the share of a core that each part of the system has used."""
    before, start = replicas.used_seconds(), time.perf_counter()

    async def run() -> tuple[list[float], list[list[Counters]]]:
        counted = [await _all_counters(replicas)]

        async def count() -> None:
            begin = time.perf_counter()
            while True:
                await asyncio.sleep(begin + len(counted) * PART_SECONDS - time.perf_counter())
                counted.append(await _all_counters(replicas))

        async with connected(replicas.url) as send:
            counting = asyncio.create_task(count())
            try:
                window = await open_loop(send, request_of(NUM_STEPS), arrivals(rate, seed), SETTLE_SECONDS, seconds)
            finally:
                counting.cancel()
                await asyncio.gather(counting, return_exceptions=True)
        check_answers(window.answers, f"{rate:.1f} requests/s")
        return window.latencies(), [*counted, await _all_counters(replicas)]

    latencies, counted = asyncio.run(run())
    took, after = time.perf_counter() - start, replicas.used_seconds()
    counts = np.diff(counted, axis=0)  # [part, replica, counter]
    _, steps, rows, _ = counts.sum(axis=(0, 1))
    row = {
        "rate": rate,
        "requests": len(latencies),
        "measured": percentiles_of(latencies),
        "rows": float(rows / steps),  # mean of a step
        "cores": {name: (after[name] - before[name]) / took for name in before},
    }
    return row, [[Counters(*of_replica) for of_replica in part] for part in counts.tolist()]


def simulate(inputs: Inputs, row: Mapping[str, Any], seed: int, seconds: float) -> dict[str, float]:
    """Returns the percentiles of a simulation with the arrivals of a measurement, and the pace in the measurement."""
    request = JobRequest(Options(0, 0, NUM_STEPS, "dpmpp", 1.0), 1)
    paces = [Pace(PART_SECONDS, factors) for factors in row["paces"]]
    coming = (Arrival(at, request) for at in arrivals(row["rate"], seed))
    cluster = Cluster(inputs.model(), NUM_REPLICAS, least_connections(seed), paces=paces)
    outcomes = cluster.run(coming, SETTLE_SECONDS + seconds)
    return percentiles_of([outcome.latency for outcome in outcomes if outcome.at >= SETTLE_SECONDS])


def _summary(row: Mapping[str, Any]) -> str:
    used = ", ".join(f"{name} {cores:.2f}" for name, cores in row["cores"].items())
    found = f"{row['requests']} requests: p95 {row['measured']['p95']:.3f} s; cores: {used}"
    return f"{row['repeat'] + 1}: {row['share']:g} of the capacity, {found}"
