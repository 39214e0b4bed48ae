"""The device of the measurements. `Machine` is a CPU. `Gpu` has the calls of torch.cuda that several measurements need.

Tests use a subclass of Machine that simulates a GPU, so that the code for a GPU also runs on a CPU.
"""

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from app.engine.job import DEFAULT_MODEL, FAST_MODEL
from app.runner.device import choose_device, choose_dtype, choose_num_threads
from app.runner.graphs.device import CudaDevice, GraphDevice
from app.runner.graphs.graph_runner import GraphRunner
from app.runner.runner import Runner
from app.runner.warm_up import PROBE_TOLERANCE
from model import checkpoint
from model.checkpoint import Checkpoint
from scripts.gpu.measurements.figures import NO_GPU, Options, Skipped

Kind = Literal["eager", "graph"]
# Largest mean absolute difference of the pixels (0..255) of images that different runners or batches generated.
LARGEST_LEVELS = 127.5 * PROBE_TOLERANCE
SYNCHRONISATION = "called a synchronizing CUDA operation"  # a part of torch's warning
# The calls of CUDA that enqueue work, as the profiler names them.
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
# CUPTI, NVIDIA's library for profilers, stays loaded after a profile. If it is unloaded, CUDA before 12.6 can crash at
# the next replay of a graph (pytorch #112507).
CUPTI_VARIABLES = {"TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1"}
MOST_SHOWN = 5  # number of kernels in Profile.longest
SMALLEST_BLOCK = 16 << 20  # bytes of the smallest tensor that fills the memory


class TimedEvent(Protocol):
    """A point in the work of the device."""

    def elapsed_time(self, end: Any) -> float:
        """Returns the milliseconds until a later event. Both must have passed."""


@dataclass(frozen=True, slots=True)
class HostEvent:
    """An event of a CPU."""

    at: float = field(default_factory=time.perf_counter)

    def elapsed_time(self, end: "HostEvent") -> float:
        """Returns the milliseconds until a later event."""
        return (end.at - self.at) * 1e3


@dataclass(frozen=True, slots=True)
class Profile:
    """The work of the device during a measurement: kernels on a GPU, operations of torch on a CPU."""

    launches: int  # calls that enqueue work
    kernels: int
    seconds: float  # the sum of the durations of the kernels
    longest: tuple[tuple[str, float], ...]  # the kernels that take the most time, with their total in seconds


class Machine:
    """A device with the checkpoints to measure."""

    is_gpu = False
    activities: Sequence[ProfilerActivity] = (ProfilerActivity.CPU,)
    kernel_type = "CPU"  # the device of the kernels in a profile

    def __init__(self, device: torch.device, dtype: torch.dtype, paths: dict[str, Path]) -> None:
        self.device, self.dtype, self.paths = device, dtype, paths

    def load(self, *, every: bool = False) -> dict[str, Checkpoint]:
        """Loads the default checkpoint, or every checkpoint. A runner moves their networks to its device."""
        return {name: checkpoint.load(path) for name, path in self.paths.items() if every or name == DEFAULT_MODEL}

    def runner(self, kind: Kind, models: dict[str, Checkpoint] | None = None, **options: Any) -> Runner:
        """Returns a runner. `options` are further arguments of GraphRunner. Raises Skipped if there is no GPU."""
        models = models or self.load()
        if kind == "graph":
            return GraphRunner(models, self.graph_device(), self.dtype, **options)
        threads = choose_num_threads(None, self.device, self.dtype, compiled=False)
        return Runner(models, self.device, self.dtype, threads)

    def kinds(self) -> tuple[Kind, ...]:
        """Returns the kinds of runners that work here."""
        return ("eager", "graph") if self.is_gpu else ("eager",)

    def graph_device(self) -> GraphDevice:
        """Returns a device for GraphRunner. Raises Skipped if there is no GPU."""
        raise Skipped(NO_GPU)

    def select(self) -> None:
        """Makes the GPU the current device of the calling thread."""

    def synchronize(self) -> None:
        """Waits until the device has done all work."""

    def event(self) -> TimedEvent:
        """Returns an event at the end of the work that is enqueued now."""
        return HostEvent()

    def reserved_bytes(self) -> int:
        """Returns the memory of the GPU that torch has reserved."""
        return 0

    def free_bytes(self) -> int:
        """Returns the free memory of the GPU."""
        raise Skipped(NO_GPU)

    def drop_cache(self) -> None:
        """Frees the memory of the GPU that torch has reserved and does not use."""

    def watch_synchronisations(self, *, on: bool) -> None:
        """Turns the warnings of torch about operations that wait for the GPU on or off."""

    def fill_memory(self, bytes_left: int) -> list[Tensor]:
        """Allocates all memory of the GPU except for about this number of bytes. Returns the tensors.

        If other processes allocate memory at the same time, fewer bytes are left.
        """
        self.drop_cache()
        blocks = []
        while (surplus := self.free_bytes() - bytes_left) > SMALLEST_BLOCK:
            size = max(SMALLEST_BLOCK, surplus // 2)
            try:
                blocks.append(torch.empty(size, dtype=torch.uint8, device=self.device))
            except torch.OutOfMemoryError:
                break
        return blocks

    @contextmanager
    def counted_synchronisations(self) -> Iterator[list[str]]:
        """Yields a list. After the block, the list has one message for each wait that torch has reported."""
        found: list[str] = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.watch_synchronisations(on=True)
            try:
                yield found
            finally:
                self.watch_synchronisations(on=False)
        found += [str(warning.message) for warning in caught if SYNCHRONISATION in str(warning.message)]

    def profile(self, work: Callable[[], None]) -> Profile:
        """Runs the work and returns its kernels."""
        self.synchronize()
        with profile(activities=self.activities) as profiler:
            work()
            self.synchronize()
        averages = profiler.key_averages()
        kernels = [each for each in averages if self._is_kernel(each)]
        seconds = {each.key: self.kernel_microseconds(each) * 1e-6 for each in kernels}
        launches = sum(each.count for each in averages if each.key.startswith(LAUNCHES))
        longest = sorted(seconds.items(), key=lambda item: -item[1])[:MOST_SHOWN]
        return Profile(launches, sum(each.count for each in kernels), sum(seconds.values()), tuple(longest))

    def kernel_microseconds(self, average: Any) -> float:
        """Returns the total duration of the kernels of one name in a profile."""
        return float(average.self_cpu_time_total)

    def _is_kernel(self, average: Any) -> bool:
        """Returns True for kernels, and False for copies, for calls on the host and for named parts of the program."""
        is_of_device = average.device_type.name == self.kernel_type and not average.is_user_annotation
        return is_of_device and not average.key.startswith(("Memcpy", "Memset", *LAUNCHES))


class Gpu(Machine):
    """An NVIDIA GPU."""

    is_gpu = True
    activities = (ProfilerActivity.CPU, ProfilerActivity.CUDA)
    kernel_type = "CUDA"

    def graph_device(self) -> GraphDevice:
        return CudaDevice(self.device)

    def select(self) -> None:
        torch.cuda.set_device(self.device.index or 0)  # set_device refuses a device without an index

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def event(self) -> TimedEvent:
        """Returns an event on the current stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def reserved_bytes(self) -> int:
        return torch.cuda.memory_reserved(self.device)

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]

    def drop_cache(self) -> None:
        torch.cuda.empty_cache()

    def watch_synchronisations(self, *, on: bool) -> None:
        torch.cuda.set_sync_debug_mode("warn" if on else "default")

    def profile(self, work: Callable[[], None]) -> Profile:
        """Runs the work and returns its kernels. Work after the first profile of the process can be slower."""
        os.environ.update(CUPTI_VARIABLES)
        return super().profile(work)

    def kernel_microseconds(self, average: Any) -> float:
        return float(average.self_device_time_total)


def open_machine(options: Options) -> Machine:
    """Returns the machine of these options. Raises RunnerError if the device cannot be used."""
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    shipped = {DEFAULT_MODEL: checkpoint.SHIPPED, FAST_MODEL: checkpoint.SHIPPED_FAST}
    paths = {DEFAULT_MODEL: options.checkpoint} if options.checkpoint else shipped
    return (Gpu if device.type == "cuda" else Machine)(device, dtype, paths)


def open_gpu(options: Options) -> Machine:
    """Returns the machine of these options. Raises Skipped if it has no GPU."""
    machine = open_machine(options)
    if not machine.is_gpu:
        raise Skipped(NO_GPU)
    return machine
