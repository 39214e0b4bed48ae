"""Checks what happens without free memory, after an error in a kernel, and without a visible GPU."""

import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np

from app.engine.interface import DeviceLostError
from app.engine.job import DEFAULT_MODEL, Job, JobRequest, StepRows
from app.engine.job import Options as JobOptions
from app.runner.runner import Runner
from scripts.gpu.measurements.engines import images_of, running_engine
from scripts.gpu.measurements.figures import Figure, Options, checked, error_line, guarded
from scripts.gpu.measurements.machine import LARGEST_LEVELS, Kind, Machine, open_gpu
from scripts.gpu.measurements.rows import new_job

NUM_IMAGES = 512  # images of the request that is sent while memory is short
BYTES_LEFT = 48 << 20  # too few for an eager step of 512 rows, and enough for one of 32 rows (estimates)
NUM_STEPS = 20
NO_CLASS = 1_000_000  # larger than any label, so that a kernel reads beyond the end of a table
OPEN_SECONDS = 60
OPEN_DEVICE = "import sys; from app.runner.device import choose_device; print(choose_device(sys.argv[1]).type)"


def measure_memory(options: Options) -> Iterator[Figure]:
    """Yields the checks of a shortage of memory. Needs a GPU."""
    machine = open_gpu(options)
    for kind in machine.kinds():
        yield from guarded(f"{kind}: shortage of memory", shortage(machine, kind, NUM_IMAGES))


def shortage(machine: Machine, kind: Kind, count: int) -> Iterator[Figure]:
    """Yields whether a large request is finished while the memory is full, and whether the engine recovers.

    The first step has all `count` images. An eager runner must run out of memory in it. A graph runner can finish it,
    because the memory of its graphs is already reserved.
    """
    with running_engine(machine, kind, max_batch=count) as (engine, runner):
        info = engine.models[DEFAULT_MODEL]
        (before,) = images_of(engine, new_job(info, seed=1, num_steps=NUM_STEPS))
        blocks = machine.fill_memory(BYTES_LEFT)
        with checked(f"{kind}: {count} images while memory is short") as large:
            images_of(engine, new_job(info, count, num_steps=NUM_STEPS))
        blocks.clear()
        machine.drop_cache()
        yield large.figure
        passed = runner.num_shortages > 0 if kind == "eager" else None
        yield Figure(f"{kind}: steps that ran out of memory", runner.num_shortages, passed=passed)
        with checked(f"{kind}: one image afterwards") as small:
            (after,) = images_of(engine, new_job(info, seed=1, num_steps=NUM_STEPS))
            if (levels := np.abs(after.astype(float) - before).mean()) > LARGEST_LEVELS:
                raise ArithmeticError(f"the image differs by {levels:.1f} levels from the one before the shortage")
        yield small.figure


def measure_graph_assert(options: Options) -> Iterator[Figure]:
    """Yields whether the graph runner reports an error in a kernel. This process cannot use the GPU afterwards."""
    yield device_assert(open_gpu(options).runner("graph"), "graph")


def measure_eager_assert(options: Options) -> Iterator[Figure]:
    """Yields whether the eager runner reports an error in a kernel. This process cannot use the GPU afterwards."""
    yield device_assert(open_gpu(options).runner("eager"), "eager")


def device_assert(runner: Runner, kind: str) -> Figure:
    """Runs a row with a label that does not exist. The runner must raise DeviceLostError."""
    name = f"{kind}: error for an index that is out of range in a kernel"
    info = runner.models[DEFAULT_MODEL]
    runner.check()
    options = JobOptions(NO_CLASS, 0, info.default_steps, info.samplers[0], 1.0)
    rows = Job(JobRequest(options, 1)).unfinished
    try:
        runner.step(StepRows.of(rows))
        runner.pixels(rows).wait()
    except Exception as error:
        return Figure(name, error_line(error), passed=isinstance(error, DeviceLostError))
    return Figure(name, "none", passed=False)


def measure_no_gpu(options: Options) -> Iterator[Figure]:
    """Yields whether the service reports clearly that no GPU is visible. `options` have no effect."""
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}

    def opening(device: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", OPEN_DEVICE, device]
        return subprocess.Popen(command, env=hidden, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    with opening("cuda") as wanted, opening("auto") as automatic:
        (_, errors), (found, other_errors) = (each.communicate(timeout=OPEN_SECONDS) for each in (wanted, automatic))
    error = (errors.strip().splitlines() or ["no error"])[-1]
    yield Figure("error of UNFOG_DEVICE=cuda", error, passed="RunnerError: UNFOG_DEVICE=cuda: " in error)
    device = found.strip()
    yield Figure("device of UNFOG_DEVICE=auto", device or other_errors[-200:], passed=device == "cpu")
