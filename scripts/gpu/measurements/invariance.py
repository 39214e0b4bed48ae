"""Compares the bytes of an image in different batches, and finds the first layer whose output differs."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from app.engine.job import DEFAULT_MODEL, Pixels, StepRows, Trajectory
from app.runner.graphs.shapes import FIXED_ROWS
from app.runner.runner import Runner
from scripts.gpu.measurements.figures import NO_GPU, Figure, Options, guarded
from scripts.gpu.measurements.machine import Machine, open_machine
from scripts.gpu.measurements.rows import new_job, run_step

SIZES, CPU_SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 512), (2, 4, 8)
NUM_STEPS = 20
SEED, OTHER_SEED = 5, 1000

Outputs = list[tuple[str, Tensor]]  # the name of each layer and its output for one row, in the order of the calls


def measure(options: Options) -> Iterator[Figure]:
    """Yields the share of equal bytes for each number of rows, and the first layer whose output differs."""
    machine = open_machine(options)
    yield from measure_on(machine, SIZES if machine.is_gpu else CPU_SIZES)


def measure_on(machine: Machine, sizes: Sequence[int], fixed_rows: int = FIXED_ROWS) -> Iterator[Figure]:
    """Yields the figures of a machine. On a CPU and in steps of a fixed size, the bytes must be equal."""
    for kind in machine.kinds():
        figures = _equal_bytes(machine.runner(kind), kind, sizes, must=not machine.is_gpu)
        yield from guarded(f"equal bytes, {kind}", figures)
    yield from guarded("first layer that differs", first_differences(machine, sizes))
    if not machine.is_gpu:
        yield Figure("equal bytes, graph", skipped=NO_GPU)
        return
    # This comes last, because the runner makes the whole process use deterministic algorithms of cuDNN.
    runner = machine.runner("graph", fixed_rows=fixed_rows)
    small = [size for size in sizes if size <= fixed_rows]
    name = f"graph, steps of {fixed_rows} rows"
    yield from guarded(f"equal bytes, {name}", _equal_bytes(runner, name, small, must=True))


def _equal_bytes(runner: Runner, name: str, sizes: Sequence[int], *, must: bool) -> Iterator[Figure]:
    for is_guided in (False, True):
        (alone,) = _images(runner, 1, [0], is_guided=is_guided)
        for size in sizes:
            positions = positions_in(size)
            images = _images(runner, size, positions, is_guided=is_guided)
            shares = [float(np.mean(image == alone)) for image in images]
            text = f"equal bytes, {name}, {'guided' if is_guided else 'plain'}, one of {size} rows"
            passed = (min(shares) == 1) if must else None
            yield Figure(f"{text}, at {_text(positions)}", 100 * min(shares), "%", passed=passed)


def positions_in(size: int) -> list[int]:
    """Returns the first, a middle and the last position of a batch."""
    return sorted({0, size // 2 - 1 if size > 2 else 0, size - 1})


def _text(positions: Sequence[int]) -> str:
    return ", ".join(map(str, positions))


def _rows(runner: Runner, size: int, positions: Sequence[int], *, is_guided: bool) -> list[Trajectory]:
    """Returns rows with different seeds, except that all rows at the positions have the same seed and label."""
    info, guided_steps = runner.models[DEFAULT_MODEL], range(NUM_STEPS if is_guided else 0)
    return [
        new_job(
            info,
            seed=SEED if place in positions else OTHER_SEED + place,
            num_steps=NUM_STEPS,
            guided_steps=guided_steps,
        ).unfinished[0]
        for place in range(size)
    ]


def _images(runner: Runner, size: int, positions: Sequence[int], *, is_guided: bool) -> list[Pixels]:
    """Returns the images at the positions of a batch. Raises ArithmeticError if one is not finite."""
    rows = _rows(runner, size, positions, is_guided=is_guided)
    for _ in range(NUM_STEPS):
        run_step(runner, rows)
    images = runner.pixels(rows).wait()
    runner.release(rows)
    chosen = [image for place in positions if (image := images[place]) is not None]
    if len(chosen) < len(positions):
        raise ArithmeticError(f"an image in a batch of {size} rows has NaN or infinite values")
    return chosen


def first_differences(machine: Machine, sizes: Sequence[int]) -> Iterator[Figure]:
    """Yields the first layer whose output for a row differs from its output for the row alone, in one eager step."""
    models = machine.load()
    runner, network = machine.runner("eager", models), models[DEFAULT_MODEL].network
    for is_guided in (False, True):
        alone = _layers(runner, network, 1, 0, is_guided=is_guided)
        for size in sizes:
            place = positions_in(size)[-1]
            name = first_difference(alone, _layers(runner, network, size, place, is_guided=is_guided))
            kind = "guided" if is_guided else "plain"
            yield Figure(f"first layer that differs, eager, {kind}, last of {size} rows", name or "none")


def first_difference(alone: Outputs, among: Outputs) -> str:
    """Returns the name of the first layer whose outputs differ, with the largest difference, or an empty string."""
    for (name, left), (_, right) in zip(alone, among, strict=False):
        if left.shape != right.shape:
            return f"{name} (other shape)"
        if not torch.equal(left, right):
            return f"{name} (by {float((left.float() - right.float()).abs().max()):.1e})"
    return ""


def _layers(runner: Runner, network: torch.nn.Module, size: int, place: int, *, is_guided: bool) -> Outputs:
    """Runs one step and returns the outputs of all layers for the row at this place."""
    outputs: Outputs = []

    def keep(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and len(output) > place:
                outputs.append((name, output[place].clone()))

        return hook

    rows = _rows(runner, size, [place], is_guided=is_guided)
    hooks = [module.register_forward_hook(keep(name)) for name, module in network.named_modules() if name]
    try:
        runner.step(StepRows.of(rows))
    finally:
        for hook in hooks:
            hook.remove()
        runner.release(rows)
    return outputs
