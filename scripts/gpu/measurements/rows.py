"""Rows for the measurements."""

from app.engine.interface import ModelInfo
from app.engine.job import Job, JobRequest, Options, StepRows, StepSet, Trajectory
from app.runner.runner import Runner

ROW_KINDS = ("plain", "guided", "mixed")  # mixed: half of the rows are guided


def new_job(
    info: ModelInfo, count: int = 1, *, seed: int = 0, num_steps: int = 0, guided_steps: StepSet | None = None
) -> Job:
    """Returns a job of the model. By default, it has the recommended number of steps and the recommended guidance."""
    sampler, num_steps = info.samplers[0], num_steps or info.default_steps
    is_guided = info.guidable if guided_steps is None else bool(guided_steps)
    scale = (info.guidance_scale[sampler] if guided_steps is None else 2.0) if is_guided else 1.0
    options = Options(seed % info.num_classes, seed, num_steps, sampler, scale, info.name)
    steps = info.guided_steps_of(options) if guided_steps is None else guided_steps
    return Job(JobRequest(options, count, guided_steps=steps))


def new_rows(info: ModelInfo, count: int, kind: str, num_steps: int = 0) -> list[Trajectory]:
    """Returns rows of one of ROW_KINDS."""
    num_steps = num_steps or info.default_steps
    guided = {"plain": 0, "guided": count, "mixed": count // 2}[kind]
    of_kind = {range(num_steps): guided, range(0): count - guided}
    parts = [
        new_job(info, number, seed=1 + bool(steps), num_steps=num_steps, guided_steps=steps).unfinished
        for steps, number in of_kind.items()
        if number
    ]
    return [row for part in parts for row in part]


def run_step(runner: Runner, rows: list[Trajectory]) -> list[Trajectory]:
    """Runs one step and counts it, as the engine does. Returns the rows that the runner reports as not finite."""
    not_finite = runner.step(StepRows.of(rows))
    for row in rows:
        row.step += 1
    return not_finite
