"""The arithmetic that draws: in which precision, compiled or not, a row's bits the same whatever the other rows."""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT32_ROWS = 16  # of a call on a CPU: other numbers of rows are summed in other orders
# The oldest compute capabilities whose tensor cores multiply these types.
BFLOAT16_CAPABILITY, FLOAT16_CAPABILITY = (8, 0), (7, 0)


def fast_dtype(device: torch.device) -> torch.dtype:
    """Returns the fastest precision that the hardware multiplies: a fact of the processor, never a timing.

    A GPU with bfloat16 units (compute capability 8.0 and newer) gets bfloat16, an older one with tensor cores (7.0
    and newer) float16. A CPU with AMX or AVX-512 BF16 gets bfloat16. Everything else gets float32.
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        fastest = {torch.bfloat16: BFLOAT16_CAPABILITY, torch.float16: FLOAT16_CAPABILITY}
        return next((dtype for dtype, least in fastest.items() if capability >= least), torch.float32)
    has = torch.cpu.get_capabilities()
    fast = has.get("amx_bf16", False) or has.get("avx512_bf16", False)
    return torch.bfloat16 if fast else torch.float32


def cpp_compiler() -> str:
    """The program that torch.compile calls for a CPU's kernels."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


def no_compiler() -> str:
    """What to say to whoever asked for it where there is none."""
    return f"needs a C++ compiler, and there is no {cpp_compiler()!r}; CXX may name one"


def can_compile() -> bool:
    """Whether that program is there."""
    return shutil.which(cpp_compiler()) is not None


@dataclass(frozen=True, slots=True)
class CallRows:
    """How many rows a call of the network has: fewer are padded with zeros, more are several calls.

    In bfloat16 torch's CPU kernels give a row the same bits in any batch (but for one: model.operations.gelu). In
    float32 they do not, so there every call has the same shape.
    """

    least: int = 1
    most: int | None = None

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> "CallRows":
        """The rule for a device and a precision."""
        if device.type == "cpu" and dtype == torch.float32:
            return cls(FLOAT32_ROWS, FLOAT32_ROWS)
        return cls()

    def call(self, denoise: Callable[[Tensor, Tensor], Tensor], x_t: Tensor, c: Tensor) -> Tensor:
        """denoise(x_t (N, C, H, W), c (N, D)) -> (N, C, H, W) for any number of rows."""
        if self == CallRows():
            return denoise(x_t, c)
        rows = self.most or len(x_t)
        calls = zip(x_t.split(rows), c.split(rows), strict=True)
        return torch.cat([denoise(self._pad(x), self._pad(c))[: len(x)] for x, c in calls])

    def _pad(self, rows: Tensor) -> Tensor:
        missing = max(self.least - len(rows), 0)
        return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows
