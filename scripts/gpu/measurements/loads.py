"""Measures the latency of one image and the throughput of the engine in this process, without HTTP."""

import statistics
import time
from collections.abc import Iterator
from queue import Empty, SimpleQueue

from app.engine.engine import Engine
from app.engine.interface import ModelInfo
from app.engine.job import DEFAULT_MODEL, Job, StepSet
from scripts.gpu.measurements.engines import JOB_SECONDS, MeasuredRunner, idle_share, images_of, running_engine
from scripts.gpu.measurements.figures import RATES, Figure, Options, Sizes, Target, guarded
from scripts.gpu.measurements.machine import Machine, open_machine
from scripts.gpu.measurements.rows import new_job

GUIDANCE: dict[str, StepSet | None] = {"guidance off": range(0), "default guidance": None}
OF_GPU = Sizes(10, ((64, 1), (512, 1), (16, 64)), 1.5, 3.0, 3.0)
OF_CPU = Sizes(1, ((2, 2),), 0.1, 0.5, 0.0)
LARGEST_IDLE_SHARE = 10.0  # in %


def measure(options: Options) -> Iterator[Figure]:
    """Yields the latency of one image and the figures of the loads."""
    machine = open_machine(options)
    yield from measure_on(machine, OF_GPU if machine.is_gpu else OF_CPU)


def measure_on(machine: Machine, sizes: Sizes) -> Iterator[Figure]:
    """Yields the figures of a machine. The loads run only with the kind of runner that the service uses."""
    for kind in machine.kinds():
        with running_engine(machine, kind) as (engine, runner):
            yield from _one_image(engine, kind, sizes.num_images)
            if kind == machine.kinds()[-1]:
                for clients, count in sizes.loads:
                    load = _of_load(machine, engine, runner, (clients, count), sizes)
                    yield from guarded(f"load, engine, {clients} x {count}", load)


def _one_image(engine: Engine, kind: str, num_images: int) -> Iterator[Figure]:
    info = engine.models[DEFAULT_MODEL]
    for name, guided_steps in GUIDANCE.items():
        seconds = []
        for seed in range(2 * num_images):
            start = time.perf_counter()
            images_of(engine, new_job(info, seed=seed, guided_steps=guided_steps))
            seconds.append(time.perf_counter() - start)
        yield Figure(f"one image, engine, {kind}, {name}", statistics.median(seconds[num_images:]) * 1e3, "ms")


def _of_load(
    machine: Machine, engine: Engine, runner: MeasuredRunner, load: tuple[int, int], sizes: Sizes
) -> Iterator[Figure]:
    clients, count = load
    for name, guided_steps in GUIDANCE.items():
        text = f"{clients} x {count}, {name}"
        loop = ClosedLoop(engine, engine.models[DEFAULT_MODEL], count, guided_steps)
        if sizes.pause_seconds:
            loop.start(clients)
            loop.run(sizes.settle_seconds)
            loop.finish()
            time.sleep(sizes.pause_seconds)
        loop.start(clients)
        loop.run(sizes.settle_seconds)
        runner.events.clear()
        runner.is_recording = True
        row_steps, num_steps, start = runner.row_steps, runner.num_steps, time.perf_counter()
        try:
            loop.run(sizes.seconds)
        finally:
            seconds, runner.is_recording = time.perf_counter() - start, False
        row_steps, num_steps = runner.row_steps - row_steps, runner.num_steps - num_steps
        loop.finish()
        machine.synchronize()
        rate = row_steps / loop.info.default_steps / seconds
        target = Target(RATES[text], is_at_most=False) if machine.is_gpu and text in RATES else None
        yield Figure(f"load, engine, {text}", rate, "images/s", target)
        yield Figure(f"rows of a step, {text}", row_steps / max(num_steps, 1))
        if machine.is_gpu and len(runner.events) > 1:
            share = 100 * idle_share(runner.events)
            yield Figure(f"device idle between steps, {text}", share, "%", Target(LARGEST_IDLE_SHARE))


class ClosedLoop:
    """Clients that send their next request when the last one is answered."""

    def __init__(self, engine: Engine, info: ModelInfo, count: int, guided_steps: StepSet | None) -> None:
        self.info = info
        self._engine, self._count, self._guided_steps = engine, count, guided_steps
        self._done: SimpleQueue[Job] = SimpleQueue()
        self._num_sent = self._num_open = 0

    def start(self, clients: int) -> None:
        """Sends the first request of each client."""
        for _ in range(clients):
            self._send()

    def run(self, seconds: float) -> None:
        """Sends a new request after each answer, for this time. Raises the error of a request that fails."""
        end = time.perf_counter() + seconds
        while (left := end - time.perf_counter()) > 0:
            try:
                self._take(left)
            except Empty:
                return
            self._send()

    def finish(self) -> None:
        """Waits until all requests are answered. Raises TimeoutError after JOB_SECONDS."""
        end = time.perf_counter() + JOB_SECONDS
        while self._num_open:
            try:
                self._take(max(end - time.perf_counter(), 0.0))
            except Empty:
                raise TimeoutError(f"{self._num_open} requests were not answered in {JOB_SECONDS:g} s") from None

    def _take(self, seconds: float) -> None:
        job = self._done.get(timeout=seconds)
        self._num_open -= 1
        job.future.result()

    def _send(self) -> None:
        job = new_job(self.info, self._count, seed=self._num_sent, guided_steps=self._guided_steps)
        job.future.add_done_callback(lambda _: self._done.put(job))
        self._num_sent += 1
        self._num_open += 1
        self._engine.submit(job)
