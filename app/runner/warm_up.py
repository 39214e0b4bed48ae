"""Before it is ready: each network draws a picture that is known, and steps are timed."""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

import numpy as np

from app.engine.job import DEFAULT_MODEL, Job, Options, Pixels, Trajectory
from app.engine.step_times import Pace
from app.runner.device import OutOfMemoryError, RunnerError
from app.runner.loaded_model import ModelInfo, Network
from app.runner.threads import OWN_SHARE, ComputeThreads

PROBE_TOLERANCE = 0.1  # mean absolute difference of pixels in [-1, 1]; bfloat16 makes 0.01, another digit 0.3
REPEATS = 3  # of what may take longer at first
HOT_ROWS = 8  # in so many, small steps have brought what they read into the caches again
TIMED_ROUNDS = 30  # at most
# No new round begins after so many seconds, for each number of threads: whoever starts the service waits for it.
TIMING_SECONDS = 0.3
LONGEST_TIMING_SECONDS = 2.0  # while there are fewer than REPEATS, or somebody else wants the core


class Timed(NamedTuple):
    """A step: how long it took, and what of it counts where batches are compared."""

    seconds: float
    work: float


class Stepper(Protocol):
    """What is warmed up."""

    @property
    def models(self) -> dict[str, ModelInfo]:
        """What is served, by name."""

    def step(self, trajectories: list[Trajectory]) -> list[bool]:
        """One reverse step for each."""

    def release(self, trajectories: list[Trajectory]) -> None:
        """Forgets their state."""

    def pixels(self, trajectories: list[Trajectory]) -> list[Pixels]:
        """The images as they are predicted now."""

    def wait(self) -> None:
        """Until the steps that were made are done."""

    @property
    def works_here(self) -> bool:
        """Whether the calling thread computes, and waits for no device."""


def check_probe(stepper: Stepper, network: Network) -> None:
    """Draws the checkpoint's known picture; RunnerError if the result differs from it."""
    probe, info = network.checkpoint.config.probe, network.info
    scale = info.guidance_scale[probe.sampler]
    options = Options(probe.digit, probe.seed, probe.num_steps, probe.sampler, scale, info.name)
    (trajectory,) = Job(options, 1, guided_steps=info.guided_steps_of(options)).unfinished
    try:
        is_finite = True
        for _ in range(probe.num_steps):
            is_finite = all(stepper.step([trajectory])) and is_finite
            trajectory.step += 1
        (drawn,) = stepper.pixels([trajectory])
    finally:
        stepper.release([trajectory])
    known = network.checkpoint.probe_image.permute(1, 2, 0).numpy().reshape(drawn.shape)  # (H, W) or (H, W, 3)
    difference = np.abs(drawn / 127.5 - 1 - known).mean()
    if not is_finite or difference > PROBE_TOLERANCE:
        what = f"differs by {difference:.2f} a pixel" if is_finite else "has NaN or infinite values"
        raise RunnerError(f"this machine draws the known picture of model {info.name!r} wrong: it {what}")


def measure_paces(
    stepper: Stepper, batches: Sequence[int], threads: ComputeThreads, should_stop: Callable[[], bool]
) -> dict[int, Pace]:
    """How long steps of the default model take with each number of threads; with all of them it goes on."""
    paces = {}
    for count in reversed(threads.counts):
        threads.set(count)
        paces[count] = _measure_pace(stepper, batches, should_stop)
    return paces


def record_shapes(stepper: Stepper, batches: Sequence[int], should_stop: Callable[[], bool]) -> None:
    """A step of each number of rows and each model, guided and not, where the first of a shape takes long."""
    for name, info in stepper.models.items():
        for rows in batches:
            for guided_steps in (range(0), range(info.max_steps))[: 1 + info.guidable]:
                if should_stop():
                    return
                trajectories = _rows_of(info, name, rows, guided_steps)
                with suppress(OutOfMemoryError):
                    for _ in range(REPEATS):
                        stepper.step(trajectories)
                stepper.release(trajectories)


def _measure_pace(stepper: Stepper, batches: Sequence[int], should_stop: Callable[[], bool]) -> Pace:
    """From some rounds, each through all batches."""
    info, start, rounds = stepper.models[DEFAULT_MODEL], time.monotonic(), list[dict[int, Timed]]()
    trajectories = {rows: _rows_of(info, DEFAULT_MODEL, rows) for rows in batches}
    try:
        for k in range(TIMED_ROUNDS):
            suffices = k >= REPEATS and not _is_disturbed(rounds)
            if k and time.monotonic() - start > (TIMING_SECONDS if suffices else LONGEST_TIMING_SECONDS):
                break
            rounds.append({})
            for rows in list(trajectories):
                if should_stop():
                    return Pace({1: 1.0})
                try:
                    rounds[-1][rows] = _time_step(stepper, trajectories[rows])
                except OutOfMemoryError:
                    _drop(stepper, trajectories, rows)
                    break
    finally:
        _drop(stepper, trajectories)
    return Pace(_in_the_quickest_round(rounds) or {1: 1.0})


def _is_disturbed(rounds: Sequence[dict[int, Timed]]) -> bool:
    steps = [step for timed in rounds for step in timed.values()]
    return sum(step.work for step in steps) < OWN_SHARE * sum(step.seconds for step in steps)


def _in_the_quickest_round(rounds: Sequence[dict[int, Timed]]) -> dict[int, float]:
    """Seconds of each batch: its share of a round's work, the median over all, times the seconds of the quickest.

    A machine that changes its speed changes it for a round's batches alike; the best time of each batch by itself
    would compare those that met a quick moment with those that did not. Fewer rows take no longer than more.
    """
    batches = set[int].intersection(*map(set, rounds))
    seconds = min(sum(steps[rows].seconds for rows in batches) for steps in rounds)
    works = [sum(steps[rows].work for rows in batches) for steps in rounds]
    shares = {
        rows: statistics.median(steps[rows].work / work for steps, work in zip(rounds, works, strict=True))
        for rows in batches
    }
    return {rows: seconds * min(share for more, share in shares.items() if more >= rows) for rows in batches}


def _drop(stepper: Stepper, trajectories: dict[int, list[Trajectory]], least: int = 0) -> None:
    """Gives back those of so many rows and more."""
    for rows in [rows for rows in trajectories if rows >= least]:
        stepper.release(trajectories.pop(rows))


def _rows_of(info: ModelInfo, name: str, rows: int, guided_steps: range = range(0)) -> list[Trajectory]:
    options = Options(0, 0, info.default_steps, info.samplers[0], 1.0, name)
    return Job(options, rows, guided_steps=guided_steps).unfinished


def _time_step(stepper: Stepper, trajectories: list[Trajectory]) -> Timed:
    """Of several that are small the last one: among its like it is quicker than after a large one.

    Beside a process that wants the core a long step waits, and a short one mostly does not: work is time on it.
    """
    for _ in range(len(trajectories), HOT_ROWS, len(trajectories)):
        stepper.step(trajectories)
    stepper.wait()
    start, on_core = time.perf_counter(), time.thread_time()
    stepper.step(trajectories)
    stepper.wait()
    seconds, on_core = time.perf_counter() - start, time.thread_time() - on_core
    return Timed(seconds, on_core if stepper.works_here else seconds)
