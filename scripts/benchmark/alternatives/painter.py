"""Draws whole requests, many at once, from x_T to x_0: what every alternative puts a server around."""

import io
import math
import statistics
import time
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from PIL import Image
from pydantic import BaseModel, Field
from torch import Tensor

from model.checkpoint import SHIPPED, load
from model.compiled.compiler import compiled_step
from model.noise import normal
from model.precision import fast_dtype
from model.sampler import Sampler, make_plan
from model.step import ReverseStep, Rows, State, Step
from scripts.common.drawing import step_cache
from scripts.common.pictures import grid

STEP_REPEATS = 40


class Request(BaseModel):
    """What this service's POST /generate takes, as far as a benchmark asks it; guidance is off."""

    digit: int = Field(ge=0, le=9)
    count: int = Field(default=1, ge=1, le=64)
    seed: int = 0
    num_steps: int = Field(default=100, ge=1, le=100)
    sampler: Sampler = "ddpm"
    guidance_scale: float = Field(default=1, ge=1, le=1)


class Painter:
    """The compiled step, and the state of one batch at a time; not for two threads at once."""

    def __init__(self, path: Path = SHIPPED, *, compiled: bool = True) -> None:
        """Loads the checkpoint in the fastest precision of this device; raises CompilerError."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.checkpoint = load(path)
        program = ReverseStep(self.checkpoint, self.device, fast_dtype(self.device))
        self._step: Step = compiled_step(program, step_cache()) if compiled else program

    @torch.inference_mode()
    def draw(self, requests: list[Request]) -> list[bytes]:
        """A PNG each, of all its images; a row that has reached x_0 is not computed on."""
        state, plans, num_steps = self._begin(requests)
        for k in range(max(num_steps.tolist())):
            slots = (num_steps > k).nonzero()[:, 0]  # (B,)
            rows = torch.arange(len(slots), device=self.device)  # (B,)
            x_prev, x_0, _ = self._step(state, plans, Rows(slots, torch.full_like(slots, k), rows, rows))
            state.x_t.index_copy_(0, slots, x_prev)
            state.x_0.index_copy_(0, slots, x_0)
        return [sheet_of(part) for part in state.x_0.split([request.count for request in requests])]

    @torch.inference_mode()
    def measure_steps(self, rows: Sequence[int]) -> dict[int, float]:
        """Seconds of a step of each of these numbers of rows, on the average; they take turns."""
        states = {count: self._begin([Request(digit=0, count=count, num_steps=1)])[:2] for count in rows}
        seconds: dict[int, list[float]] = {count: [] for count in rows}
        for _ in range(STEP_REPEATS):
            for count, (state, plans) in states.items():
                slots = torch.arange(count, device=self.device)  # (B,)
                start = time.perf_counter()
                _, _, finite = self._step(state, plans, Rows(slots, torch.zeros_like(slots), slots, slots))
                finite.cpu()  # waits for a GPU
                seconds[count].append(time.perf_counter() - start)
        return {count: statistics.mean(found) for count, found in seconds.items()}

    def _begin(self, requests: list[Request]) -> tuple[State, Tensor, Tensor]:
        """x_T of every image, the requests' plans one after the other (P, 5), and the steps of each image (B,)."""
        shape = self.checkpoint.image_shape
        plans = [make_plan(self.checkpoint.schedule, asked.sampler, asked.num_steps) for asked in requests]
        starts = accumulate((plan.num_steps for plan in plans), initial=0)
        rows = [
            (asked.seed, index, asked.digit, start, asked.num_steps)
            for asked, start in zip(requests, starts, strict=False)
            for index in range(asked.count)
        ]
        state = State.zeros(len(rows), shape, self.device)
        columns = torch.tensor(rows, device=self.device).T.contiguous().unbind()  # (B,) each
        state.seed, state.index, state.y, state.plan_row, num_steps = columns
        state.x_t = normal(state.seed, state.index, torch.zeros_like(state.seed), shape)  # (B, C, H, W)
        return state, torch.cat([plan.table(self.device) for plan in plans]), num_steps


def sheet_of(x_0: Tensor) -> bytes:
    """(B, 1, H, W) in [-1, 1] -> one PNG, row by row, as near to a square as may be."""
    columns = math.ceil(math.sqrt(len(x_0)))
    black = x_0.new_full((-len(x_0) % columns, *x_0.shape[1:]), -1)
    buffer = io.BytesIO()
    Image.fromarray(grid(torch.cat([x_0, black]).cpu(), columns)[..., 0].numpy()).save(buffer, "PNG")
    return buffer.getvalue()
