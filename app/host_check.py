"""Measures the host cost of the service with a runner that computes nothing: `python -m app.host_check PART`.

engine      CPU time of the engine thread in a step of 512 rows
admission   CPU time of the admission of one image, by the number of images in the backlog
operations  tensor operations of a step, inside and outside of the network
serve PORT  serves HTTP on this port of 127.0.0.1 until SIGTERM, so that a load generator can measure requests

The step of the runner only sleeps, without the interpreter's lock, as long as a GPU would take. All other work is that
of the service on a GPU. The first three parts print one line of JSON. `python -m scripts.bench host` runs all parts.
"""

import argparse
import asyncio
import json
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from app.engine.admission import Admission
from app.engine.engine import Engine
from app.engine.job import Job, JobRequest, Options, Pixels, Trajectory
from app.engine.step_times import StepTimes
from app.log_writer import LogWriter
from app.logs import configure_logging
from app.main import create_app
from app.metrics import Metrics
from app.runner.device_state import rows_of
from app.runner.runner import BATCHES_AHEAD, Runner
from app.server.server import bind, serve
from app.settings import Settings
from model import checkpoint

STEP_SECONDS = 3e-4  # the assumed duration of a step on a GPU
ROWS = 512
NUM_STEPS, GUIDED_STEPS = 100, range(27, 73)
LOADS = {"8 x 64": (8, 64), "512 x 1": (512, 1)}  # jobs and images per job
BACKLOGS = (64, 1024, 10_000)
NUM_ADMISSIONS = 200
ROUNDS = 5  # lives of the rows that a measurement of the engine takes
# Operations that launch no kernel on a GPU, in addition to views.
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "resize_", "is_pinned", "_unsafe_view", "lift_fresh"}


class SleepingRunner(Runner):
    """Does the host's part of each step. Instead of the device's part it sleeps for STEP_SECONDS."""

    def __init__(self) -> None:
        super().__init__(
            {"default": checkpoint.load(checkpoint.SHIPPED)}, torch.device("cpu"), torch.bfloat16, runs_ahead=True
        )
        self.on_step: Callable[[], None] = lambda: None
        self.on_finish: Callable[[Sequence[Trajectory]], None] = lambda rows: None
        self._image: Pixels = np.zeros(self.image_shape[1:], dtype=np.uint8)

    def step(self, trajectories: list[Trajectory], before_call: Callable[[], None] = lambda: None) -> list[bool]:
        """Assigns slots, makes the row indices, and sleeps."""
        self.on_step()
        for trajectory in trajectories:
            if not trajectory.slots:
                trajectory.slots = (self._slots._free.pop(),)
        rows_of(trajectories, 10, self._shapes, self._transfers)
        before_call()
        time.sleep(STEP_SECONDS)
        return [True] * len(trajectories)

    def pixels(self, trajectories: list[Trajectory]) -> list[Pixels]:
        """Returns black images."""
        self.on_finish(trajectories)
        return [self._image] * len(trajectories)

    def warm_up(self, should_stop: Callable[[], bool]) -> StepTimes:
        """Returns the same duration for every size."""
        return StepTimes(dict.fromkeys(BATCHES_AHEAD, STEP_SECONDS))


def new_job(count: int = 1, timeout: float = math.inf) -> Job:
    """Returns a job with the default number of steps and with guidance."""
    return Job(JobRequest(Options(3, 1, NUM_STEPS, "ddpm", 3.0), count, timeout, guided_steps=GUIDED_STEPS))


def measure_engine(num_jobs: int, count: int, *, staggered: bool) -> float:
    """Returns the CPU time in seconds that the engine thread takes for one step of all these images.

    A new job follows each finished one. All jobs begin at the same step, or with `staggered` at different steps. The
    CPU time of submitting the jobs is not part of the result.
    """
    runner, done = SleepingRunner(), threading.Event()
    engine = _new_engine(lambda: runner)
    groups = min(num_jobs, NUM_STEPS) if staggered else 1
    first, last = NUM_STEPS + groups, NUM_STEPS * (1 + ROUNDS) + groups
    num_steps, submitting, times = 0, 0.0, dict[int, float]()

    def submit(number: int) -> None:
        nonlocal submitting
        start = time.thread_time()
        for _ in range(number):
            engine.submit(new_job(count))
        submitting += time.thread_time() - start

    def on_step() -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps <= groups:
            submit(len(range(num_steps - 1, num_jobs, groups)))
        times[num_steps] = time.thread_time() - submitting
        if num_steps == last:
            done.set()

    def on_finish(rows: Sequence[Trajectory]) -> None:
        images = Counter(row.job for row in rows)
        if num_steps > NUM_STEPS:  # the first job, which is not measured, ends in step NUM_STEPS
            submit(sum(len(job.unfinished) == number for job, number in images.items()))

    runner.on_step, runner.on_finish = on_step, on_finish
    engine.start()
    engine.ready.result()
    engine.submit(new_job())
    done.wait()
    engine.stop(10)
    return (times[last] - times[first]) / (last - first)


def measure_admission(backlog: int) -> float:
    """Returns the CPU time in seconds of the admission of one image, with this number of images in the backlog."""
    admission = Admission(2 * backlog, ROWS)
    admission.open(StepTimes(dict.fromkeys(BATCHES_AHEAD, STEP_SECONDS)))
    for _ in range(backlog):
        admission.admit(new_job(timeout=1e6), time.monotonic())
    seconds = 0.0
    for _ in range(NUM_ADMISSIONS):
        job, now = new_job(timeout=1e6), time.monotonic()
        start = time.thread_time()
        admission.admit(job, now)
        seconds += time.thread_time() - start
        admission.select(now)
        admission.backlog.remove(job)
    return seconds / NUM_ADMISSIONS


class _Operations(TorchDispatchMode):
    """Counts the operations that launch a kernel, by the part of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.part = "other"

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func._schema.name.removeprefix("aten::") not in NO_KERNEL:
            self.counts[self.part] += 1
        return func(*args, **(kwargs or {}))


def count_operations(*, guided: bool) -> dict[str, int]:
    """Returns the number of tensor operations of one step, inside of the network and elsewhere."""
    runner = Runner(
        {"default": checkpoint.load(checkpoint.SHIPPED)}, torch.device("cpu"), torch.bfloat16, runs_ahead=True
    )
    program, operations = runner._models["default"].program, _Operations()
    denoise = program.denoise

    def counted(x_t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        with operations.within("network"):
            return denoise(x_t, c)

    program.denoise = counted
    steps = range(NUM_STEPS) if guided else range(0)
    (row,) = Job(JobRequest(Options(3, 1, NUM_STEPS, "ddpm", 3.0), 1, guided_steps=steps)).unfinished
    runner.step([row])
    with operations:
        runner.step([row])
    return dict(operations.counts)


def _new_engine(load: Callable[[], Runner]) -> Engine:
    return Engine(load, capacity=100_000, max_batch=ROWS, watchdog_seconds=60.0, metrics=Metrics())


def _serve(port: int) -> None:
    settings = Settings(queue_capacity=100_000, max_batch=ROWS)
    configure_logging("json", settings.log_level, LogWriter(os.open(os.devnull, os.O_WRONLY)))
    asyncio.run(serve(create_app(settings, SleepingRunner), settings, bind("127.0.0.1", port)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one part."""
    parser = argparse.ArgumentParser(
        prog="python -m app.host_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    for part in ("engine", "admission", "operations"):
        parts.add_parser(part)
    parts.add_parser("serve").add_argument("port", type=int)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    match given.part:
        case "engine":
            results: Any = {
                f"{name}{', staggered' if staggered else ''}": measure_engine(*load, staggered=staggered)
                for name, load in LOADS.items()
                for staggered in (False, True)
            }
        case "admission":
            results = {backlog: measure_admission(backlog) for backlog in BACKLOGS}
        case "operations":
            results = {name: count_operations(guided=name == "guided") for name in ("plain", "guided")}
        case "serve":
            return _serve(given.port)
    print(json.dumps(results))
    return None


if __name__ == "__main__":
    main()
