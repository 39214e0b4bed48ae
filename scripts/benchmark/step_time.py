"""Compares networks by number of weights, arithmetic and time of a step, measured in one run."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from model.compiled.private_cache import default_cache, use_private_compile_cache
from model.precision import fast_dtype
from model.unet import UNet
from scripts.common.progress import Reporter

REPEATS = 25
COLUMNS = ("network", "parameters", "GFLOP per call", "ms per step")


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of one network."""

    num_parameters: int
    flop: int  # per call with one row; a multiply-add counts as two
    seconds: float  # the shortest call with all rows


def costs_of(networks: dict[str, UNet], reporter: Reporter, *, rows: int, compiled: bool) -> dict[str, Cost]:
    """Measures the networks in turns, so that other load on the machine affects all of them."""
    calls = {name: _call(network, rows, compiled=compiled) for name, network in networks.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with reporter.task("timing", (REPEATS + 1) * len(calls), "steps") as task, torch.inference_mode():
        for _ in range(REPEATS + 1):  # the first call of each network compiles
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
                task.advance(1)
    return {name: Cost(count_parameters(net), flop_of(net), min(seconds[name][1:])) for name, net in networks.items()}


def count_parameters(network: UNet) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def flop_of(network: UNet) -> int:
    """Returns the floating point operations of a call with one row.

    The part that depends only on t and y is not counted, since the service looks it up in a table.
    """
    x_t, c = _inputs(network, 1)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network.denoise(x_t, c)
    total: int = counter.get_total_flops()
    return total


def as_row(name: str, cost: Cost) -> list[str]:
    """Returns the cells of COLUMNS."""
    return [name, f"{cost.num_parameters / 1e6:.2f} M", f"{cost.flop / 1e9:.3f}", f"{cost.seconds * 1e3:.1f}"]


def _call(network: UNet, rows: int, *, compiled: bool) -> Callable[[], Tensor]:
    """Returns a function that runs the network as in the service: in the fast dtype, x_t in channels_last."""
    device = torch.device("cpu")
    served = UNet(network.config).to(device, fast_dtype(device))
    served.load_state_dict(network.state_dict())
    served = served.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload] # not in the stubs
    if compiled:
        use_private_compile_cache(default_cache())
    denoise = torch.compile(served.denoise) if compiled else served.denoise
    x_t, c = (part.to(device, fast_dtype(device)) for part in _inputs(network, rows))
    x_t = x_t.contiguous(memory_format=torch.channels_last)
    return lambda: denoise(x_t, c)


def _inputs(network: UNet, rows: int) -> tuple[Tensor, Tensor]:
    config = network.config
    x_t = torch.randn(rows, config.image_channels, config.image_size, config.image_size)  # (B, C, H, W)
    t, y = torch.full((rows,), config.num_steps), torch.arange(rows) % config.num_classes  # (B,) each
    return x_t, network.condition(t, y).detach()
