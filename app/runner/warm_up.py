"""Warms up before the service is ready: each model draws its known picture, and steps are timed."""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np

from app.engine.interface import ModelInfo, OutOfMemoryError, RunnerError, StepRunner
from app.engine.job import DEFAULT_MODEL, Job, JobRequest, Options, Trajectory
from app.engine.step_times import StepTimes
from app.runner.loaded_model import LoadedModel

PROBE_TOLERANCE = 0.1  # mean absolute difference of pixels in [-1, 1]; bfloat16 gives 0.01, another digit 0.3
FEWEST_ROUNDS, MOST_ROUNDS = 3, 30
# No new round begins after TIMING_SECONDS. With fewer than FEWEST_ROUNDS, or while another process uses the core, the
# limit is LONGEST_TIMING_SECONDS.
TIMING_SECONDS, LONGEST_TIMING_SECONDS = 0.3, 2.0
QUIET_SHARE = 0.9  # of the time of the steps in which the core works, if no other process uses it
# A small step is timed after others of its size: after a large step, its weights are not in the processor's caches.
# A step of one row takes 1.0 ms after a step of one row, and 1.55 ms after a step of 64 rows (Zen 5).
HOT_ROWS = 8

# Makes a step. Returns its seconds, and the seconds in which the calling thread, or the GPU, worked.
TimeStep = Callable[[list[Trajectory]], tuple[float, float]]


def check_known_picture(runner: StepRunner, model: LoadedModel) -> None:
    """Draws the checkpoint's known picture; RunnerError if the result differs from it."""
    probe, info = model.checkpoint.config.probe, model.info
    scale = info.guidance_scale[probe.sampler]
    options = Options(probe.digit, probe.seed, probe.num_steps, probe.sampler, scale, info.name)
    (trajectory,) = Job(JobRequest(options, 1, guided_steps=info.guided_steps_of(options))).unfinished
    try:
        is_finite = True
        for _ in range(probe.num_steps):
            is_finite = all(runner.step([trajectory])) and is_finite
            trajectory.step += 1
        (drawn,) = runner.pixels([trajectory])
    finally:
        runner.release([trajectory])
    known = model.checkpoint.probe_image.permute(1, 2, 0).numpy().reshape(drawn.shape)  # (H, W) or (H, W, 3)
    difference = np.abs(drawn / 127.5 - 1 - known).mean()
    if not is_finite or difference > PROBE_TOLERANCE:
        what = f"differs by {difference:.2f} a pixel" if is_finite else "has NaN or infinite values"
        raise RunnerError(f"this machine draws the known picture of model {info.name!r} wrong: it {what}")


def measure_step_times(
    runner: StepRunner, time_step: TimeStep, batches: Sequence[int], should_stop: Callable[[], bool]
) -> StepTimes:
    """Times steps of the default model in rounds through all batches.

    The time of a batch is its share of a round's work, the median over the rounds, times the seconds of the fastest
    round. Work is the time in which the core or the GPU worked: while another process wants the core, a long step waits
    for it and a short one mostly does not. Shares compare batches although the machine changes its speed between
    rounds. While another process used the core, four starts with medians of the work itself chose full steps of 4, 8,
    64 and 64 evaluations, and six starts with shares 32 or 64 (Xeon with AMX). Batches for which the device has too
    little memory are left out.
    """
    start, info = time.monotonic(), runner.models[DEFAULT_MODEL]
    jobs = {rows: _new_rows(info, rows) for rows in batches}
    rounds: list[dict[int, tuple[float, float]]] = []
    try:
        while len(rounds) < MOST_ROUNDS and not should_stop():
            is_enough = len(rounds) >= FEWEST_ROUNDS and not _is_busy(rounds)
            limit = TIMING_SECONDS if is_enough else LONGEST_TIMING_SECONDS
            if rounds and time.monotonic() - start > limit:
                break
            rounds.append(_time_round(time_step, jobs, should_stop))
            for rows in set(jobs) - set(rounds[-1]):
                runner.release(jobs.pop(rows))
    finally:
        for trajectories in jobs.values():
            runner.release(trajectories)
    measured = set[int].intersection(*map(set, rounds)) if rounds else set[int]()
    if not measured:
        return StepTimes({1: 1.0})
    work = [sum(steps[rows][1] for rows in measured) for steps in rounds]
    share = {
        rows: statistics.median(steps[rows][1] / whole for steps, whole in zip(rounds, work, strict=True))
        for rows in measured
    }
    quickest = min(sum(steps[rows][0] for rows in measured) for steps in rounds)
    # Fewer rows take no longer than more.
    return StepTimes({rows: quickest * min(share[more] for more in measured if more >= rows) for rows in measured})


def _is_busy(rounds: Sequence[dict[int, tuple[float, float]]]) -> bool:
    """Returns True if another process used the core during these rounds."""
    steps = [step for times in rounds for step in times.values()]
    return sum(work for _, work in steps) < QUIET_SHARE * sum(seconds for seconds, _ in steps)


def record_shapes(runner: StepRunner, batches: Sequence[int], should_stop: Callable[[], bool]) -> None:
    """Makes steps with each number of rows of each model, guided and not, since the first steps of a shape are slow."""
    for info in runner.models.values():
        for rows in batches:
            for guided_steps in (range(0), range(info.max_steps))[: 1 + info.guidable]:
                if should_stop():
                    return
                trajectories = _new_rows(info, rows, guided_steps)
                with suppress(OutOfMemoryError):
                    for _ in range(FEWEST_ROUNDS):
                        runner.step(trajectories)
                runner.release(trajectories)


def _time_round(
    time_step: TimeStep, jobs: dict[int, list[Trajectory]], should_stop: Callable[[], bool]
) -> dict[int, tuple[float, float]]:
    times: dict[int, tuple[float, float]] = {}
    for rows, trajectories in jobs.items():
        try:
            for _ in range(max(1, HOT_ROWS // rows)):
                if should_stop():
                    return times
                times[rows] = time_step(trajectories)
        except OutOfMemoryError:
            break
    return times


def _new_rows(info: ModelInfo, count: int, guided_steps: range = range(0)) -> list[Trajectory]:
    options = Options(0, 0, info.default_steps, info.samplers[0], 1.0, info.name)
    return Job(JobRequest(options, count, guided_steps=guided_steps)).unfinished
