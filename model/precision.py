"""Precision and batch shape of network calls, and whether a C++ compiler is available.

Each row of a batch has the same bits in every batch. CallRows ensures this where torch's kernels do not.
"""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT32_ROWS = 16  # rows per network call on a CPU; the number of rows changes the order of float32 sums
# The oldest compute capabilities with tensor cores for these types.
BFLOAT16_CAPABILITY, FLOAT16_CAPABILITY = (8, 0), (7, 0)


def fast_dtype(device: torch.device) -> torch.dtype:
    """Returns the fastest dtype for which the hardware has multiply instructions.

    GPUs with compute capability 8.0 or newer get bfloat16, GPUs with 7.x get float16. CPUs with AMX or AVX-512
    BF16 get bfloat16. All others get float32. The choice depends on processor features and never on timings, because a
    restart must not change the images.
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        fastest = {torch.bfloat16: BFLOAT16_CAPABILITY, torch.float16: FLOAT16_CAPABILITY}
        return next((dtype for dtype, least in fastest.items() if capability >= least), torch.float32)
    has = torch.cpu.get_capabilities()
    fast = has.get("amx_bf16", False) or has.get("avx512_bf16", False)
    return torch.bfloat16 if fast else torch.float32


def cpp_compiler() -> str:
    """Returns the C++ compiler that torch.compile calls for CPU kernels: the value of CXX, or its default."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


def no_compiler() -> str:
    """Returns the error message for a missing C++ compiler. The caller puts the name of an option before it."""
    return f"needs a C++ compiler, but {cpp_compiler()!r} was not found. Install it, or set CXX to another compiler"


def can_compile() -> bool:
    """Returns True if the C++ compiler is installed."""
    return shutil.which(cpp_compiler()) is not None


@dataclass(frozen=True, slots=True)
class CallRows:
    """Limits of the number of rows in a network call. Too few rows are padded with zeros. Too many rows are split.

    In bfloat16, torch's CPU kernels compute the same bits for a row in every batch. model.operations.gelu works around
    the only exception. In float32 they do not, so every call has the same number of rows.
    """

    least: int = 1
    most: int | None = None

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> "CallRows":
        """Returns the limits for a device and a dtype."""
        if device.type == "cpu" and dtype == torch.float32:
            return cls(FLOAT32_ROWS, FLOAT32_ROWS)
        return cls()

    def call(self, denoise: Callable[[Tensor, Tensor], Tensor], x_t: Tensor, c: Tensor) -> Tensor:
        """Returns denoise(x_t, c), (N, C, H, W), for any number of rows. x_t is (N, C, H, W) and c is (N, D)."""
        if self == CallRows():
            return denoise(x_t, c)
        rows = self.most or len(x_t)
        calls = zip(x_t.split(rows), c.split(rows), strict=True)
        return torch.cat([denoise(self._pad(x), self._pad(c))[: len(x)] for x, c in calls])

    def _pad(self, rows: Tensor) -> Tensor:
        missing = max(self.least - len(rows), 0)
        return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows
