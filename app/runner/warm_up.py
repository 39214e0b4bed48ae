"""Warm-up before the service is ready: tests each model with its probe image, and measures the step times.

Probe image: a checkpoint contains one image and the options that generate it. Warm-up generates it again and compares.
A large difference means that this machine computes wrong results, for example because of a miscompiled kernel, and the
service does not start.

Step times: the scheduler needs the duration of a step by batch size (see engine/step_times.py). They are measured in
rounds. A round runs steps of every batch size. `measure_step_times` describes the calculation.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from app.engine.interface import ModelInfo, OutOfMemoryError, RunnerError, StepRunner
from app.engine.job import Job, JobRequest, Options, StepRows, Trajectory
from app.runner.loaded_model import LoadedModel
from model.clip import Clip
from model.clip_guidance import similarity_gradient
from model.spec import CALL_ROWS

# Maximum mean absolute difference of pixels in [-1, 1]. Rounding to bfloat16 gives 0.01. A different class gives 0.3.
PROBE_TOLERANCE = 0.1
FEWEST_ROUNDS, MOST_ROUNDS = 3, 30
# No round starts after TIMING_SECONDS. If there are fewer than FEWEST_ROUNDS, or if another process uses the core, the
# limit is LONGEST_TIMING_SECONDS.
TIMING_SECONDS, LONGEST_TIMING_SECONDS = 0.3, 2.0
QUIET_SHARE = 0.9  # minimum share of the duration of the steps in which the thread has its core on an idle machine
# In a round, a batch of n rows is repeated HOT_ROWS / n times, and the last step counts. After a step of another size,
# the weights are not in the caches: on a Zen 5, a step of one row takes 1.0 ms after another step of one row, but
# 1.55 ms after a step of 64 rows.
HOT_ROWS = 8
CLIP_ROUNDS = 7  # maximum number of calls of CLIP that are measured

# Runs a step. Returns its duration, and the part of it in which the calling thread had a core or the GPU was busy.
TimeStep = Callable[[list[Trajectory]], tuple[float, float]]


def check_probe_image(runner: StepRunner, model: LoadedModel) -> None:
    """Generates the probe image of the model. Raises RunnerError if the result differs from the stored image."""
    probe, info = model.loaded.probe, model.info
    scale = info.guidance_scale[probe.sampler]
    options = Options(
        probe.digit, probe.seed, probe.num_steps, probe.sampler, scale, info.name, model.loaded.probe_path
    )
    (trajectory,) = Job(JobRequest(options, 1, guided_steps=info.guided_steps_of(options))).unfinished
    try:
        is_finite = True
        for _ in range(probe.num_steps):
            is_finite = not runner.step(StepRows.of([trajectory])) and is_finite
            trajectory.step += 1
        (image,) = runner.pixels([trajectory]).wait()
    finally:
        runner.release([trajectory])
    stored = model.loaded.probe_image.permute(1, 2, 0).numpy()  # (H, W, C)
    is_finite = is_finite and image is not None
    difference = 0.0 if image is None else np.abs(image / 127.5 - 1 - stored.reshape(image.shape)).mean()
    if not is_finite or difference > PROBE_TOLERANCE:
        reason = (
            f"differs by {difference:.2f} per pixel (limit {PROBE_TOLERANCE})"
            if is_finite
            else "has NaN or infinite values"
        )
        raise RunnerError(
            f"this machine computes wrong images: the probe image of model {info.name!r} {reason}. "
            "Try UNFOG_COMPILE=off or UNFOG_DTYPE=float32"
        )


def measure_step_times(
    runner: StepRunner, model: str, time_step: TimeStep, batches: Sequence[int], should_stop: Callable[[], bool]
) -> dict[int, float]:
    """Measures the seconds of a step of a model by its number of rows, in rounds of all batches.

        time of a batch = median over the rounds of (work of the batch / work of the round) * duration of fastest round

    Work is the part of a step's duration in which the thread had a core. It excludes waiting: while another process
    competes for the core, long steps wait for it, but short steps usually do not. On a GPU, work is the whole duration.

    Shares of a round are compared, not times, because the speed of the machine can change between rounds. Within one
    round it affects all batches. This was measured on a Xeon with AMX while another process used the core. With shares,
    the best batch was 32 or 64 in six starts. With medians of the work, it was 4, 8, 64 and 64 in four starts.

    Batches for which the device does not have enough memory are left out. Returns 1 s for one
    evaluation if there is no result.
    """
    start, info = time.monotonic(), runner.models[model]
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
        return {1: 1.0}
    work = [sum(steps[rows][1] for rows in measured) for steps in rounds]
    share = {
        rows: statistics.median(steps[rows][1] / whole for steps, whole in zip(rounds, work, strict=True))
        for rows in measured
    }
    quickest = min(sum(steps[rows][0] for rows in measured) for steps in rounds)
    # A smaller batch never takes longer than a larger one. Larger measured values are noise.
    return {rows: quickest * min(share[more] for more in measured if more >= rows) for rows in measured}


@torch.inference_mode()
def measure_clip_call(clip: Clip, image_shape: tuple[int, int, int], should_stop: Callable[[], bool]) -> float:
    """Returns the median duration of a call of CLIP for guidance, in seconds.

    The measurement ends after LONGEST_TIMING_SECONDS, so that a slow model is measured fewer times.
    """
    x_0 = torch.zeros(CALL_ROWS, *image_shape, device=clip.device)  # (CALL_ROWS, C, H, W)
    text = clip.embed_prompts([""]).expand(CALL_ROWS, -1)  # (CALL_ROWS, E)
    seconds: list[float] = []
    while not seconds or (len(seconds) < CLIP_ROUNDS and sum(seconds) < LONGEST_TIMING_SECONDS and not should_stop()):
        start = time.perf_counter()
        similarity_gradient(clip, x_0, text).cpu()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _is_busy(rounds: Sequence[dict[int, tuple[float, float]]]) -> bool:
    """Returns True if another process competed for the core during these rounds."""
    steps = [step for times in rounds for step in times.values()]
    return sum(work for _, work in steps) < QUIET_SHARE * sum(seconds for seconds, _ in steps)


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
