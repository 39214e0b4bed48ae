"""Runs the engine and the runner of a CPU while large allocations fail."""

import copy

import torch
from torch import Tensor

from app.engine.job import Job, JobRequest, Options
from app.engine.step_times import StepTimes
from model.checkpoint import Checkpoint
from tests.app.fakes import new_engine
from tests.app.runner.rows import draw, equal, new_runner


def test_images_are_generated_in_smaller_batches_if_an_allocation_fails(loaded: Checkpoint) -> None:
    runner, request = new_runner(copy.deepcopy(loaded), torch.bfloat16), JobRequest(Options(3, 1, 6, "ddpm", 1.0), 8)
    program = runner._models["default"].program
    denoise = program.denoise

    def denoise_few(x: Tensor, c: Tensor) -> Tensor:
        if len(x) > 4:
            torch.empty(1 << 60, dtype=torch.uint8)  # more than the address space
        return denoise(x, c)

    program.denoise = denoise_few
    engine = new_engine(runner, capacity=100, max_batch=16)
    engine.open(runner, StepTimes({1: 1.0, 16: 1.0}))
    job = Job(request)
    engine.submit(job)
    while not job.closed:
        engine.loop._tick()
    assert equal(job.future.result(), draw(new_runner(loaded, torch.bfloat16), Job(request).unfinished))
    assert engine._admission.max_batch == 4
