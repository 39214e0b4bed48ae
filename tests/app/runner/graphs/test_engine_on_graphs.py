"""Runs the engine with the graph runner on a late device: random jobs, cancellations, previews and failures."""

import copy
import random

import pytest
import torch

from app import errors
from app.api.http.requests import ClientGoneError
from app.engine.job import ImageDone, Job, JobRequest, Options, Pixels, Progress
from app.engine.step_times import StepTimes
from app.runner.graphs.graph_runner import GraphRunner
from app.runner.graphs.shapes import Shape
from app.runner.loaded_model import LoadedModel
from model.checkpoint import Checkpoint
from tests.app.fakes import backlog_of, new_engine
from tests.app.runner.late_device import LateDevice
from tests.app.runner.rows import draw, equal, new_runner

NAN_DIGIT = 3


def random_request(choose: random.Random, runner: GraphRunner, events: list[Progress | ImageDone]) -> JobRequest:
    digit, sampler = choose.randrange(6), choose.choice(["ddpm", "ddim", "dpmpp"])
    scale = choose.choice([1.0, 2.5])
    options = Options(digit, choose.randrange(1000), choose.choice([1, 3, 8]), sampler, scale)  # type: ignore[arg-type]
    guided_steps = runner.models["default"].guided_steps_of(options)
    previews = choose.choice([0, 2])
    return JobRequest(
        options, choose.randint(1, 4), num_previews=previews, listener=events.append, guided_steps=guided_steps
    )


def images_of(loaded: Checkpoint, request: JobRequest) -> list[Pixels]:
    return draw(new_runner(loaded), Job(request).unfinished)


class RandomRun:
    """An engine on graphs with random jobs and cancellations. Jobs of NAN_DIGIT have NaN.

    Some captures of more than one row run out of memory, which lowers the batch size.
    """

    def __init__(self, loaded: Checkpoint, seed: int) -> None:
        self.choose, broken = random.Random(seed), copy.deepcopy(loaded)
        broken.network.class_embed.weight.data[NAN_DIGIT] = torch.nan
        self.runner = GraphRunner({"default": broken}, LateDevice(seed), torch.float32, num_slots=4, most_rows=8)
        self.engine = new_engine(self.runner, max_batch=self.choose.choice([3, 16]))
        self.engine.open(self.runner, StepTimes({1: 1.0, 16: 1.0}))
        self.jobs, self.cancelled = dict[Job, list[Progress | ImageDone]](), set[Job]()
        self._capture, self.runner._capture = self.runner._capture, self.capture  # type: ignore[method-assign]

    def capture(self, model: LoadedModel, shape: Shape) -> None:
        if shape.rows > 1 and self.choose.random() < 0.2:
            raise torch.OutOfMemoryError
        self._capture(model, shape)

    def submit_or_cancel(self) -> None:
        if self.choose.random() < 0.4:
            events: list[Progress | ImageDone] = []
            job = Job(random_request(self.choose, self.runner, events))
            self.engine.submit(job)
            self.jobs[job] = events
        open_jobs = [job for job in self.jobs if not job.closed]
        if open_jobs and self.choose.random() < 0.1:
            job = self.choose.choice(open_jobs)
            self.engine.cancel(job, ClientGoneError())
            self.cancelled.add(job)

    def tick(self) -> bool:
        """Runs one iteration. Returns False if there is nothing to do."""
        has_work = any(self.engine.count_images()) or bool(self.engine._abandoned)
        if has_work:
            self.engine.loop._tick()
        return has_work


@pytest.mark.parametrize("seed", range(8))
def test_every_job_has_the_bytes_of_the_cpu_runner_or_its_own_error(loaded: Checkpoint, seed: int) -> None:
    run = RandomRun(loaded, seed)
    for _ in range(40):
        run.submit_or_cancel()
        run.tick()
    while run.tick():
        pass
    for job, events in run.jobs.items():
        if job in run.cancelled:
            assert isinstance(job.future.exception(), ClientGoneError)
        elif job.request.options.label == NAN_DIGIT:
            assert isinstance(job.future.exception(), errors.InternalError)
        else:
            expected = images_of(loaded, job.request)
            assert equal(job.future.result(), expected)
            done = {event.index: event.pixels for event in events if isinstance(event, ImageDone)}
            assert equal([done[index] for index in range(job.request.count)], expected)
    slots = run.runner._slots["default"]
    assert len(slots._free) == len(slots.state.seed) - 1
    assert backlog_of(run.engine).work == 0
