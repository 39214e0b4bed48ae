"""Measures the time of each kernel of a reverse step, not compiled and compiled.

The compiled step is compiled again, so that it contains the names of its kernels. For its share of the machine's matrix
rate, steps take turns with a large matrix product: if other load slows down the machine, it affects both equally.
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

from model.checkpoint import SHIPPED, load
from model.compiled import compiler
from model.compiled.memory import keep_freed_memory
from model.files import write_json
from model.precision import fast_dtype
from model.step import ReverseStep, Rows, State, Step
from scripts.benchmark.machine import matrix_rate, this_machine
from scripts.benchmark.report import Table, with_spread
from scripts.benchmark.step_time import flop_of
from scripts.common.progress import Reporter
from scripts.evaluation.tables import as_table

WARM_UP, REPEATS, TURNS = 5, 20, 60
Inputs = tuple[State, Tensor, Rows]  # inputs of a step: the state, the plans, the rows
KINDS = (  # the first whose part is in a kernel's name
    ("normalisation", ("group_norm", "var_mean", "layer_norm", "rsqrt")),
    ("convolutions and products", ("convolution", "linear", "mm", "attention", "conv2d")),
    ("activations", ("gelu", "silu", "tanh", "erf")),
    ("copies", ("copy", "clone", "cat", "to_copy", "contiguous", "empty", "index")),
)
OTHER, WHOLE, SHARE = "all else", "whole", "of the matrix rate, %"


def measure_profile(rows: int, num_threads: int | None, out: Path | None, reporter: Reporter) -> None:
    """Profiles a step of `rows` rows on the CPU, prints the table and writes the results if `out` is given."""
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
    """Columns and lines of what was found, as the JSON has it."""
    by_name: dict[str, dict[str, float]] = found["milliseconds"]
    columns = (f"ms of a step, rows: {found['rows']}", *by_name)
    lines = [
        [kind, *(f"{of_it.get(kind, 0.0):.2f}" for of_it in by_name.values())]
        for kind in (*(name for name, _ in KINDS), OTHER, WHOLE)
    ]
    shares = with_spread([100 * share for share in found["matrix_shares"]])
    return columns, [*lines, [SHARE, *["-"] * (len(by_name) - 1), shares]]


def matrix_shares(step: Step, inputs: Inputs, flop: int) -> list[float]:
    """What a step makes of the matrix rate that is measured right after it, again and again."""
    shares = []
    with torch.inference_mode():
        for _ in range(TURNS):
            start = time.perf_counter()
            step(*inputs)
            seconds = time.perf_counter() - start
            shares.append(flop / seconds / matrix_rate(torch.device("cpu")))
    return shares


def milliseconds_by_kind(step: Step, inputs: Inputs) -> dict[str, float]:
    """Of one call: its kernels by kind, what lies between them, and the whole as it is without the profiler."""
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
    """What a kernel does, by its name; a fused one does the first of what it is named for."""
    return next((kind for kind, parts in KINDS if any(part in kernel for part in parts)), OTHER)


def _time(call: Callable[[], object]) -> float:
    """Milliseconds, the least of a few."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1000 * min(seconds)


def _with_names(program: ReverseStep, cache: Path) -> Step:
    """Compiled so that the profiler sees each kernel."""
    with mock.patch.dict(compiler.OPTIONS, {"cpp.enable_kernel_profile": True}):
        return compiler.compiled_step(program, cache)


def _inputs(program: ReverseStep, count: int) -> Inputs:
    state, rows = State.zeros(count, program.checkpoint.image_shape, program.device), torch.arange(count)
    state.x_t.normal_()
    t = program.checkpoint.schedule.num_steps // 2
    plans = torch.tensor([[t, 0.9, 0.1, 0.0, 0.1]])
    return state, plans, Rows(rows, torch.zeros_like(rows), rows, rows)
