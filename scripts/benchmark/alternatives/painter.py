"""Generates the images of whole requests in one batch, from x_T to x_0. All alternative servers use it."""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from model.checkpoint import load
from model.compiled.compiler import compiled_step
from model.png import encode_pixels, sheet_shape
from model.precision import fast_dtype
from model.process import begin, draw
from model.sampler import make_plan
from model.spec import SHIPPED, Sampler
from model.step import ReverseStep, Rows, Step
from scripts.common.drawing import step_cache
from scripts.common.pictures import arrange

STEP_REPEATS = 40


class Request(BaseModel):
    """The fields of POST /generate that the benchmarks use. Guidance must be off."""

    digit: int = Field(ge=0, le=9)
    count: int = Field(default=1, ge=1, le=64)
    seed: int = 0
    num_steps: int = Field(default=100, ge=1, le=100)
    sampler: Sampler = "ddpm"
    guidance_scale: float = Field(default=1, ge=1, le=1)


class Painter:
    """Runs the compiled step for one batch at a time. Not thread-safe."""

    def __init__(self, path: Path = SHIPPED, *, compiled: bool = True) -> None:
        """Loads the checkpoint in the fastest dtype of this device. Raises CompilerError."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.checkpoint = load(path)
        program = ReverseStep(self.checkpoint, self.device, fast_dtype(self.device))
        self._step: Step = compiled_step(program, step_cache()) if compiled else program

    def draw(self, requests: list[Request]) -> list[bytes]:
        """Returns a PNG with all images of a request, for each request. A finished image takes no more steps."""
        plans = [make_plan(self.checkpoint.schedule, request.sampler, request.num_steps) for request in requests]
        rows = [
            (request.seed, index, request.digit, plan)
            for request, plan in zip(requests, plans, strict=True)
            for index in range(request.count)
        ]
        seed, index, y, plan_of_row = zip(*rows, strict=True)
        x_0 = draw(
            self._step,
            plan_of_row,
            self.checkpoint.image_shape,
            seed=torch.tensor(seed, device=self.device),
            index=torch.tensor(index, device=self.device),
            y=torch.tensor(y, device=self.device),
        )
        return [sheet_of(part) for part in x_0.split([request.count for request in requests])]

    @torch.inference_mode()
    def measure_steps(self, rows: Sequence[int]) -> dict[int, float]:
        """Returns the mean seconds of a step for each number of rows, measured in turns."""
        plan, shape = make_plan(self.checkpoint.schedule, "ddpm", 1), self.checkpoint.image_shape
        zeros = {count: torch.zeros(count, dtype=torch.int64, device=self.device) for count in rows}
        begun = {count: begin([plan] * count, shape, seed=zero, index=zero) for count, zero in zeros.items()}
        seconds: dict[int, list[float]] = {count: [] for count in rows}
        for _ in range(STEP_REPEATS):
            for count, (state, plans, first_row) in begun.items():
                slots = torch.arange(count, device=self.device)  # (B,)
                start = time.perf_counter()
                stepped = self._step(state, plans, Rows(slots, first_row, zeros[count], zeros[count], slots))
                stepped.finite.cpu()  # waits until a GPU has finished
                seconds[count].append(time.perf_counter() - start)
        return {count: statistics.mean(found) for count, found in seconds.items()}


def sheet_of(x_0: Tensor) -> bytes:
    """Returns a contact sheet of (B, 1, H, W) in [-1, 1] as a PNG."""
    return encode_pixels(arrange(x_0.cpu(), sheet_shape(len(x_0))).numpy())
