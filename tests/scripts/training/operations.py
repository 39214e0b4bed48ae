"""Finds operations that make the host wait for a device, without such a device.

The device `meta` replaces a GPU. Its tensors have no values, so an operation that needs a value fails. Its steps use
the operations for devices other than a CPU, and every copy from or to the host is visible.
"""

import contextlib
import sys
from typing import Any

import pytest
import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tape import tensors


def depends_on_values(func: OpOverload, args: tuple[Any, ...]) -> bool:
    """Returns True if the host needs a value of the device for the result, or for its shape."""
    aten = torch.ops.aten
    if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):  # only masks need values
        return any(index.dtype in (torch.bool, torch.uint8) for index in tensors(args[1]))
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


class Operations(TorchDispatchMode):
    """Counts the operations and those that depend on values. Lists those with tensors of several devices."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = self.num_reads = 0
        self.copies: list[str] = []

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.num_calls += 1
        self.num_reads += depends_on_values(func, args)
        devices = {tensor.device.type for tensor in tensors((args, kwargs))}
        if (target := (kwargs or {}).get("device")) is not None:
            devices.add(torch.device(target).type)
        if len(devices) > 1:
            self.copies.append(str(func))
        return func(*args, **(kwargs or {}))


class MetaGenerator:
    """Replaces the generator of the device. torch has none for meta."""

    device = torch.device("meta")

    def manual_seed(self, seed: int) -> "MetaGenerator":
        return self


def replace_what_meta_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a Trainer work on meta: random numbers, autocast and the check of the fused optimizer."""
    own_generator = torch.Generator

    def generator_of(device: Any = "cpu") -> Any:
        return MetaGenerator() if torch.device(device).type == "meta" else own_generator(device)

    monkeypatch.setattr(torch, "Generator", generator_of)
    for name in ("rand", "randn", "randint"):
        monkeypatch.setattr(torch, name, _without_meta_generator(getattr(torch, name)))
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())
    adam = sys.modules[torch.optim.Adam.__module__]  # torch.optim hides this module
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda parameter: None)


def _without_meta_generator(draw: Any) -> Any:
    def replaced(*args: Any, generator: Any = None, **options: Any) -> Any:
        return draw(*args, generator=None if isinstance(generator, MetaGenerator) else generator, **options)

    return replaced
