"""Measures the time of each kind of kernel in a reverse step, not compiled and compiled.

The step is compiled again, with names for its kernels. To compare it with the machine's matrix rate, steps take turns
with a large matrix product, so that other load on the machine affects both equally.
"""

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from model.checkpoint import load
from model.compiled import compiler
from model.compiled.memory import keep_freed_memory
from model.files import write_json
from model.precision import fast_dtype
from model.spec import SHIPPED
from model.step import ReverseStep, Rows, State, Step
from scripts.benchmark.machine import matrix_rate, this_machine
from scripts.benchmark.report import Table, with_spread
from scripts.benchmark.step_time import flop_of
from scripts.common.progress import Reporter
from scripts.evaluation.tables import as_table

WARM_UP, REPEATS, TURNS = 5, 20, 60
Inputs = tuple[State, Tensor, Rows]  # inputs of a step: the state, the plans, the rows
KINDS = (  # kind of kernel, and the parts of kernel names that identify it; the first match applies
    ("normalisation", ("group_norm", "var_mean", "layer_norm", "rsqrt")),
    ("convolutions and products", ("convolution", "linear", "mm", "attention", "conv2d")),
    ("activations", ("gelu", "silu", "tanh", "erf")),
    ("copies", ("copy", "clone", "cat", "to_copy", "contiguous", "empty", "index")),
)
OTHER, WHOLE = "all else", "whole"  # keys in the JSON file
LABELS = {OTHER: "other", WHOLE: "total, without the profiler"}
SHARE = "share of the matrix rate, %"


def measure_profile(rows: int, num_threads: int | None, out: Path | None, reporter: Reporter) -> None:
    """Profiles a step with `rows` rows on the CPU, prints the table, and writes the results if `out` is given."""
    if num_threads:
        torch.set_num_threads(num_threads)
    keep_freed_memory()
    device = torch.device("cpu")
    found: dict[str, Any] = {"machine": this_machine().as_json(), "rows": rows, "milliseconds": {}}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("not compiled", "compiled"):
            program = ReverseStep(load(SHIPPED), device, fast_dtype(device))
            step = _with_names(program, Path(cache)) if name == "compiled" else program
            found["milliseconds"][name] = milliseconds_by_kind(step, _inputs(program, rows))
        flop = rows * flop_of(load(SHIPPED).network)
        found["matrix_shares"] = matrix_shares(step, _inputs(program, rows), flop)
    reporter.line(as_table(*profile_table(found)))
    if out:
        write_json(out, found)


def profile_table(found: Mapping[str, Any]) -> Table:
    """Returns the table of a JSON result."""
    by_name: dict[str, dict[str, float]] = found["milliseconds"]
    columns = (f"ms per step of {found['rows']} rows", *by_name)
    lines = [
        [LABELS.get(kind, kind), *(f"{times.get(kind, 0.0):.2f}" for times in by_name.values())]
        for kind in (*(name for name, _ in KINDS), OTHER, WHOLE)
    ]
    shares = with_spread([100 * share for share in found["matrix_shares"]])
    return columns, [*lines, [SHARE, *["-"] * (len(by_name) - 1), shares]]


def matrix_shares(step: Step, inputs: Inputs, flop: int) -> list[float]:
    """Returns the arithmetic rate of a step divided by the matrix rate measured directly after it, TURNS times.

    `flop` is the number of floating point operations of a step.
    """
    shares = []
    with torch.inference_mode():
        for _ in range(TURNS):
            start = time.perf_counter()
            step(*inputs)
            seconds = time.perf_counter() - start
            shares.append(flop / seconds / matrix_rate(torch.device("cpu")))
    return shares


def milliseconds_by_kind(step: Step, inputs: Inputs) -> dict[str, float]:
    """Returns the milliseconds of one step by kind of kernel, and its total time without the profiler."""
    with torch.inference_mode():
        for _ in range(WARM_UP):
            step(*inputs)
        whole = _time(lambda: step(*inputs))
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(REPEATS):
                step(*inputs)
    kinds: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        kinds[kind_of(event.key)] += event.self_cpu_time_total / 1000 / REPEATS
    return {**kinds, WHOLE: whole}


def kind_of(kernel: str) -> str:
    """Returns the kind of a kernel, from its name. A fused kernel gets the first kind in KINDS that matches."""
    return next((kind for kind, parts in KINDS if any(part in kernel for part in parts)), OTHER)


def _time(call: Callable[[], object]) -> float:
    """Returns the shortest of REPEATS calls in milliseconds."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1000 * min(seconds)


def _with_names(program: ReverseStep, cache: Path) -> Step:
    """Compiles the step with names that the profiler can see."""
    with mock.patch.dict(compiler.OPTIONS, {"cpp.enable_kernel_profile": True}):
        return compiler.compiled_step(program, cache)


def _inputs(program: ReverseStep, count: int) -> Inputs:
    state, rows = State.zeros(count, program.checkpoint.image_shape, program.device), torch.arange(count)
    state.x_t.normal_()
    t = program.checkpoint.schedule.num_steps // 2
    plans = torch.tensor([[t, 0.9, 0.1, 0.0, 0.1, 1.0, 0.0]])
    zeros = torch.zeros_like(rows)
    return state, plans, Rows(rows, zeros, zeros, zeros, rows)
