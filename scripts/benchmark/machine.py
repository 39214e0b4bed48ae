"""Describes the machine and measures its matrix rate, the reference for the speed of a step."""

import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from model.precision import fast_dtype

SIZE = 2048  # size of the square matrices; large, so that the multiplication dominates the time
REPEATS = 3


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine that a benchmark ran on."""

    processor: str
    cores: int
    features: tuple[str, ...]  # instruction sets used for bfloat16 products
    gpu: str | None
    torch: str
    threads: int

    def as_json(self) -> dict[str, Any]:
        """Returns the fields for the JSON file of raw results."""
        return asdict(self)


def this_device() -> torch.device:
    """Returns the GPU if there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def this_machine() -> Machine:
    """Returns the description of the machine that runs this process."""
    has = torch.cpu.get_capabilities()
    features = tuple(name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if has.get(name))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return Machine(processor(), len(_usable_cores()), features, gpu, torch.__version__, threads=torch.get_num_threads())


def matrix_rate(device: torch.device, dtype: torch.dtype | None = None) -> float:
    """Returns the operations per second of a large matrix product, the best of three. A multiply-add counts as two.

    `dtype` defaults to the fastest one of the device.
    """
    dtype = dtype or fast_dtype(device)
    left, right = (torch.randn(SIZE, SIZE, device=device).to(dtype) for _ in range(2))
    seconds = []
    with torch.inference_mode():
        for _ in range(REPEATS + 1):  # the first product warms up the device
            _wait(device)
            start = time.perf_counter()
            torch.mm(left, right)
            _wait(device)
            seconds.append(time.perf_counter() - start)
    return 2 * SIZE**3 / min(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def processor() -> str:
    """Returns the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _usable_cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
