"""Checks that the device computes the right images and the right noise."""

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from app.engine.job import Pixels
from model.noise import block_counter, normal, random_words
from scripts.gpu.measurements.figures import NO_GPU, Figure, Options, Skipped, checked, guarded
from scripts.gpu.measurements.machine import LARGEST_LEVELS, Kind, Machine, open_machine
from scripts.gpu.measurements.rows import new_rows, run_step

NUM_ROWS = 64  # number of rows whose noise is compared
LARGEST_DIFFERENCE = 1e-6  # of noise values, relative to max(1, |z|)
TESTS = Path(__file__).parents[3] / "tests"
TEST_PACKAGES = ("pytest", "pytest_timeout")
TEST_SECONDS = 80
NO_TESTS = 5  # the exit status of pytest if no test is selected


def measure(options: Options) -> Iterator[Figure]:
    """Yields the checks of the device, and the result of the tests that need a GPU."""
    machine = open_machine(options)
    yield from measure_on(machine)
    yield gpu_tests(machine)


def measure_on(machine: Machine) -> Iterator[Figure]:
    """Yields the checks of a device."""
    yield from guarded("noise", noise(machine))
    images: dict[Kind, list[Pixels]] = {}
    for kind in machine.kinds():
        yield from guarded(f"images, {kind}", _images(machine, kind, images))
    if not machine.is_gpu:
        yield Figure("probe images, graph", skipped=NO_GPU)
    if len(images) == 2:
        yield _difference(images)


def _images(machine: Machine, kind: Kind, images: dict[Kind, list[Pixels]]) -> Iterator[Figure]:
    """Yields the check of the probe images. Adds other images to `images`, so that the runners can be compared."""
    runner = machine.runner(kind, machine.load(every=True))
    with checked(f"probe images, {kind}: {', '.join(runner.models)}") as check:
        runner.check()
    yield check.figure
    rows = new_rows(runner.models["default"], 4, "mixed", num_steps=20)
    for _ in range(20):
        run_step(runner, rows)
    images[kind] = [image for image in runner.pixels(rows).wait() if image is not None]
    runner.release(rows)


def _difference(images: dict[Kind, list[Pixels]]) -> Figure:
    """Returns the check that the images with and without graphs are nearly equal."""
    graph, eager = (np.stack(images[kind]).astype(np.float64) for kind in ("graph", "eager"))
    levels = float(np.abs(graph - eager).mean())
    return Figure("images of graph and eager, mean difference", levels, "levels", passed=levels <= LARGEST_LEVELS)


@torch.inference_mode()
def noise(machine: Machine) -> Iterator[Figure]:
    """Compares the noise of the device with that of the CPU."""
    shape = machine.load()["default"].image_shape
    seed = torch.arange(NUM_ROWS) * (2**53 // NUM_ROWS) + 12345
    index, step = torch.arange(NUM_ROWS) % 7, torch.arange(NUM_ROWS) % 101
    cpu = torch.device("cpu")

    def on(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        key = [part.to(device) for part in (seed, index, step)]
        block = block_counter(shape, device)
        words, z = random_words(key[0], key[1], key[2], block), normal(key[0], key[1], key[2], shape, block)
        return words.to(cpu), z.to(cpu)

    (words, z), (cpu_words, cpu_z) = on(machine.device), on(cpu)
    different = int((words != cpu_words).sum())
    yield Figure("random words that differ from the CPU", different, f"of {words.numel()}", passed=different == 0)
    error = float(((z - cpu_z).abs() / cpu_z.abs().clamp(min=1)).max())
    passed = error <= LARGEST_DIFFERENCE
    yield Figure("normal noise, largest relative difference from the CPU", error, passed=passed)


def gpu_tests(machine: Machine) -> Figure:
    """Runs the tests with the marker `gpu`, if they and pytest are installed."""
    name = "tests with the marker gpu"
    try:
        files = _test_files(machine)
    except Skipped as reason:
        return Figure(name, skipped=str(reason))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *map(str, files)]
    try:
        done = subprocess.run(
            command, cwd=TESTS.parent, capture_output=True, text=True, check=False, timeout=TEST_SECONDS
        )
    except subprocess.TimeoutExpired:
        return Figure(name, f"not finished after {TEST_SECONDS} s", passed=False)
    if done.returncode == NO_TESTS:
        return Figure(name, skipped="no test has this marker")
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return Figure(name, lines[-1] if lines else "no output", passed=done.returncode == 0)


def _test_files(machine: Machine) -> list[Path]:
    if not machine.is_gpu:
        raise Skipped(NO_GPU)
    if missing := [package for package in TEST_PACKAGES if not find_spec(package)]:
        raise Skipped(f"not installed: {', '.join(missing)}")
    files = [path for path in sorted(TESTS.rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    if not files:
        raise Skipped("no test has this marker")
    return files
