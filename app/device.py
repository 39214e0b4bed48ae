"""Which device and which precision serve, and what the device's failures mean."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from app.cores import granted_cores
from app.threads import ComputeThreads
from model.precision import fast_dtype

log = logging.getLogger(__name__)

MAX_PLAIN_THREADS = 2


class RunnerError(Exception):
    """The device or the checkpoint cannot serve; one sentence."""


class OutOfMemoryError(Exception):
    """The batch was too large for the device; a smaller one may do."""


class DeviceLostError(Exception):
    """The device answers no more; nothing that it held can be saved."""


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one; RunnerError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RunnerError(f"UNFOG_DEVICE={name}, but torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is what the hardware multiplies fast."""
    return fast_dtype(device) if name == "auto" else {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def choose_num_threads(
    wanted: int | None, device: torch.device, dtype: torch.dtype, *, compiled: bool
) -> ComputeThreads:
    """The compute threads of a CPU: as many as are wanted, else all that it may use, or one fewer where that is faster.

    In float32, not compiled, torch's GELU ends the share of each of three and more with scalar code where the share is
    no whole number of vectors: a row's last bits would depend on its place.
    """
    most = torch.get_num_threads()
    if granted := granted_cores():
        most = min(most, math.ceil(granted))
    if (device.type, dtype, compiled) == ("cpu", torch.float32, False):
        most = min(most, MAX_PLAIN_THREADS)
        if wanted and wanted > MAX_PLAIN_THREADS:
            log.warning("with %d threads a seed's bytes depend on the load here; with up to 2 they do not", wanted)
    may_vary = device.type == "cpu" and most > 1 and not wanted
    threads = ComputeThreads((most, most - 1) if may_vary else (wanted or most,))
    threads.set(threads.counts[0])
    return threads


@contextmanager
def device_errors() -> Iterator[None]:
    """Turns what torch raises for the device's sake into what the engine understands."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemoryError from error
    except torch.AcceleratorError as error:
        raise DeviceLostError(str(error).splitlines()[0]) from error
