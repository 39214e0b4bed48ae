"""Measures the host cost of this version with a runner that computes nothing.

Run one part with `python -m scripts.benchmark.host_check PART`:

engine      CPU time of the engine thread in a step of 512 rows
admission   CPU time of the admission of one image, by the number of images in the backlog
operations  tensor operations of a step, inside and outside of the network
serve PORT  serves HTTP on this port of 127.0.0.1 until SIGTERM, so that a load generator can measure requests

In the parts `engine` and `serve`, a step only sleeps for 0.3 ms, the assumed duration of a step on a GPU. All other
work is that of the service on a GPU. The part `operations` runs steps on the CPU. The first three parts print one line
of JSON. `python -m scripts.bench host` runs all parts.
"""

import argparse
import asyncio
import json
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from app.engine.admission import Admission
from app.engine.engine import Engine
from app.engine.job import Job, JobRequest, Options, StepRows, Trajectory
from app.engine.step_loop import StepLoop
from app.engine.step_times import StepTimes
from app.log_writer import LogWriter
from app.logs import configure_logging
from app.main import create_app
from app.metrics import Metrics
from app.runner.graphs.graph_runner import BATCHES, GraphRunner
from app.server.server import bind, serve
from app.settings import Settings
from model import checkpoint
from model.step import ReverseStep
from scripts.benchmark.operations import Operations
from scripts.benchmark.sleeping_runner import STEP_SECONDS, EagerDevice, SleepingRunner

ROWS = 512
NUM_STEPS, GUIDED_STEPS = 100, range(27, 73)
LOADS = {"8 x 64": (8, 64), "512 x 1": (512, 1)}  # (jobs, images of each job)
BACKLOGS = (64, 1024, 10_000)
NUM_ADMISSIONS = 200
LONGEST_SECONDS = 120.0  # time limit for one measurement of the engine
ROUNDS = 5  # number of steps in a measurement of the engine, as a multiple of the steps of an image


def new_job(count: int = 1, timeout: float = math.inf, guided_steps: range = GUIDED_STEPS) -> Job:
    """Returns a job with the default number of steps and with guidance."""
    return Job(JobRequest(Options(3, 1, NUM_STEPS, "ddpm", 3.0), count, timeout=timeout, guided_steps=guided_steps))


def measure_engine(num_jobs: int, count: int, *, staggered: bool) -> float:
    """Returns the CPU time in seconds that the engine thread takes for one step of all these images.

    A new job follows each finished one. All jobs begin at the same step, or with `staggered` at different steps. The
    result does not contain the CPU time of submitting the jobs. Raises TimeoutError after LONGEST_SECONDS.
    """
    runner, done, metrics = SleepingRunner(), threading.Event(), Metrics()
    engine = Engine(capacity=100_000, max_batch=ROWS, watchdog_seconds=60.0, metrics=metrics)
    loop = StepLoop(engine, lambda: runner, metrics)
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
    loop.start()
    engine.ready.result()
    engine.submit(new_job())
    if not done.wait(LONGEST_SECONDS):
        raise TimeoutError(f"The engine did not finish {last} steps within {LONGEST_SECONDS:g} s. Use an idle machine")
    loop.stop(10)
    return (times[last] - times[first]) / (last - first)


def measure_admission(backlog: int) -> float:
    """Returns the CPU time in seconds of the admission of one image, with this number of images in the backlog."""
    admission = Admission(2 * backlog, ROWS)
    admission.open(StepTimes(dict.fromkeys(BATCHES, STEP_SECONDS)))
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


def count_operations(job: Job) -> Counter[str]:
    """Returns the number of tensor operations in the second step of a job's first image, by the part of the step."""
    torch.set_num_threads(1)
    runner = GraphRunner({"default": checkpoint.load(checkpoint.SHIPPED)}, EagerDevice(), torch.bfloat16)
    program, operations = runner._models["default"].program, Operations()
    assert isinstance(program, ReverseStep)
    denoise = program.denoise

    def counted(x_t: Tensor, c: Tensor) -> Tensor:
        with operations.within("network"):
            return denoise(x_t, c)

    program.denoise = counted
    row = job.unfinished[0]
    runner.step(StepRows.of([row]))
    with operations:
        runner.step(StepRows.of([row]))
    return operations.counts


def _serve(port: int) -> None:
    settings = Settings(queue_capacity=100_000, max_batch=ROWS)
    configure_logging("json", settings.log_level, LogWriter(os.open(os.devnull, os.O_WRONLY)))
    asyncio.run(serve(create_app(settings, SleepingRunner), settings, bind("127.0.0.1", port)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one part and prints its results."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmark.host_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    for part in ("engine", "admission", "operations"):
        parts.add_parser(part)
    parts.add_parser("serve").add_argument("port", type=int)
    given = parser.parse_args(arguments)
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
            kinds = {"plain": range(0), "guided": range(NUM_STEPS)}
            results = {kind: count_operations(new_job(guided_steps=steps)) for kind, steps in kinds.items()}
        case "serve":
            return _serve(given.port)
    print(json.dumps(results))
    return None


if __name__ == "__main__":
    main()
