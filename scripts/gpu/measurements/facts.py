"""Finds facts about the machine, and measures the highest speed of its hardware."""

import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator

import torch

from app.runner.device import NVIDIA_DRIVER, granted_cores
from scripts.benchmark.machine import processor
from scripts.benchmark.step_time import flop_of
from scripts.gpu.measurements.figures import NO_GPU, Figure, Options, guarded
from scripts.gpu.measurements.machine import Machine, open_machine

COPY_BYTES, CPU_COPY_BYTES = 1 << 30, 1 << 26
MATRIX, CPU_MATRIX = 8192, 512  # edge length of the matrices
ROUNDS = 5
NUM_LAUNCHES = 1000


def measure(options: Options) -> Iterator[Figure]:
    yield from measure_on(open_machine(options))


def measure_on(machine: Machine) -> Iterator[Figure]:
    yield Figure("processor", processor())
    yield Figure("cores", f"{os.cpu_count()} of the machine, limit {granted_cores() or 'none'}")
    yield Figure("Python", platform.python_version())
    yield Figure("torch", torch.__version__)
    yield Figure("CUDA of torch", torch.version.cuda or "none")
    yield Figure("precision", str(machine.dtype).removeprefix("torch."))
    parts = {"ceilings": _ceilings(machine)}
    if machine.is_gpu:
        parts = {"GPU": gpu_facts(machine.device), **parts, "launches": launches(machine)}
    else:
        yield from (Figure(name, skipped=NO_GPU) for name in ("GPU", "launch of a small kernel"))
    for name, figures in parts.items():
        yield from guarded(name, figures)


def gpu_facts(device: torch.device) -> Iterator[Figure]:
    properties = torch.cuda.get_device_properties(device)
    yield Figure("GPU", properties.name)
    yield Figure("compute capability", f"{properties.major}.{properties.minor}")
    yield Figure("multiprocessors", properties.multi_processor_count)
    yield Figure("memory", properties.total_memory / 2**30, "GiB")
    yield Figure("driver", _driver())
    yield Figure("cuDNN", str(torch.backends.cudnn.version()))


def _ceilings(machine: Machine) -> Iterator[Figure]:
    """Yields the memory bandwidth, the matrix rate, and the rate of images that follows from the matrix rate."""
    yield Figure("memory bandwidth, read and write of a copy", _copy_rate(machine) / 1e9, "GB/s")
    rate = _matrix_rate(machine)
    yield Figure("matrix rate", rate / 1e12, "TFLOP/s")
    (loaded,) = machine.load().values()
    flop, steps = flop_of(loaded.network), loaded.config.spec.default_steps
    yield Figure("one evaluation of the network", flop / 1e9, "GFLOP")
    yield Figure(f"highest rate of images with {steps} steps without guidance", rate / (flop * steps), "images/s")


def _copy_rate(machine: Machine) -> float:
    """Returns the bytes per second that a large copy reads and writes."""
    size = COPY_BYTES if machine.is_gpu else CPU_COPY_BYTES
    source = torch.zeros(size, dtype=torch.uint8, device=machine.device)
    copy = torch.empty_like(source)
    return 2 * size / _seconds(machine, lambda: copy.copy_(source))


def _matrix_rate(machine: Machine) -> float:
    """Returns the floating-point operations per second of a large matrix product."""
    edge = MATRIX if machine.is_gpu else CPU_MATRIX
    a, b = torch.randn(2, edge, edge, device=machine.device).to(machine.dtype)
    return 2 * edge**3 / _seconds(machine, lambda: a @ b)


def launches(machine: Machine) -> Iterator[Figure]:
    """Yields the time to launch one addition, as a single kernel and as a graph."""
    x = torch.zeros(1, device=machine.device)
    with torch.inference_mode():
        graph = machine.graph_device().capture(lambda: _add(x))
    for name, launch in {"small kernel": lambda: _add(x), "graph of one kernel": graph.replay}.items():
        host, device = _time_launches(machine, launch)
        yield Figure(f"launch of a {name}, host", host * 1e6, "µs")
        yield Figure(f"launch of a {name}, device", device * 1e6, "µs")
    waits = [_time(machine, lambda: _add(x)) for _ in range(ROUNDS * ROUNDS)]
    yield Figure("launch of a small kernel and wait for it", statistics.median(waits) * 1e6, "µs")


def _add(x: torch.Tensor) -> None:
    x.add_(1)


def _time_launches(machine: Machine, launch: Callable[[], object]) -> tuple[float, float]:
    """Returns the mean seconds of a launch on the host and on the device, for many launches in a row."""
    with torch.inference_mode():
        launch()
        machine.synchronize()
        first, start = machine.event(), time.perf_counter()
        for _ in range(NUM_LAUNCHES):
            launch()
        host, last = time.perf_counter() - start, machine.event()
        machine.synchronize()
    return host / NUM_LAUNCHES, first.elapsed_time(last) * 1e-3 / NUM_LAUNCHES


def _seconds(machine: Machine, work: Callable[[], object]) -> float:
    """Returns the shortest duration of the work in several runs, in seconds."""
    with torch.inference_mode():
        return min(_time(machine, work) for _ in range(1 + ROUNDS))


def _time(machine: Machine, work: Callable[[], object]) -> float:
    machine.synchronize()
    start = time.perf_counter()
    work()
    machine.synchronize()
    return time.perf_counter() - start


def _driver() -> str:
    if program := shutil.which("nvidia-smi"):
        query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
        if not done.returncode and done.stdout.strip():
            return done.stdout.split()[0]
    return NVIDIA_DRIVER.read_text().splitlines()[0] if NVIDIA_DRIVER.exists() else "unknown"
