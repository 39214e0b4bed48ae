"""Tests of the machine: the parts that a CPU and a GPU share, and the names that only a GPU uses."""

import ast
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg

from scripts.gpu.measurements import machine as machine_module
from scripts.gpu.measurements.figures import Options, Skipped
from scripts.gpu.measurements.machine import SYNCHRONISATION, Gpu, HostEvent, Machine, open_gpu, open_machine
from tests.scripts.gpu.measurements.pretended import PretendedGpu

ROOT = Path(__file__).parents[4]
FOLDERS = ("scripts/gpu/measurements", "app/runner/graphs")


def names_of_torch() -> list[str]:
    """Returns every name such as `torch.cuda.synchronize` in the measurements and the graph runner."""
    found = set()
    for folder in FOLDERS:
        for path in (ROOT / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and ast.unparse(node).startswith(("torch.cuda.", "torch.backends.")):
                    found.add(ast.unparse(node))
    return sorted(name for name in found if "(" not in name)


@pytest.mark.parametrize("name", names_of_torch())
def test_every_name_of_cuda_exists_in_torch(name: str) -> None:
    value = reduce(getattr, name.split(".")[1:], torch)
    assert getattr(value, "__deprecated__", None) is None


def test_names_of_cuda_are_found() -> None:
    assert {"torch.cuda.set_sync_debug_mode", "torch.cuda.mem_get_info", "torch.cuda.CUDAGraph"} <= set(
        names_of_torch()
    )


def test_gpu_replaces_each_method_that_does_nothing_on_a_cpu() -> None:
    shared = {"load", "runner", "kinds", "fill_memory", "counted_synchronisations", "_is_kernel", "__init__"}
    methods = {name for name, value in vars(Machine).items() if callable(value)}
    assert methods - shared == {name for name, value in vars(Gpu).items() if callable(value)}


def test_gpu_calls_cuda_with_arguments_that_it_accepts(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls are checked against the signatures in torch. Only set_device refuses a device without an index."""
    cuda = create_autospec(torch.cuda)
    cuda.mem_get_info.return_value = (5, 9)
    cuda.memory_reserved.return_value = 7
    monkeypatch.setattr(torch, "cuda", cuda)
    gpu = Gpu(torch.device("cuda"), torch.bfloat16, {"default": tiny})
    gpu.select()
    gpu.synchronize()
    gpu.drop_cache()
    for is_on in (True, False):
        gpu.watch_synchronisations(on=is_on)
    assert (gpu.free_bytes(), gpu.reserved_bytes()) == (5, 7)
    assert gpu.event() is cuda.Event.return_value
    assert gpu.graph_device().device == gpu.device
    cuda.set_device.assert_called_once_with(0)
    cuda.Event.assert_called_once_with(enable_timing=True)
    assert [call.args for call in cuda.set_sync_debug_mode.call_args_list] == [("warn",), ("default",)]


def test_event_measures_milliseconds() -> None:
    assert HostEvent(1.0).elapsed_time(HostEvent(1.5)) == 500


def test_profile_has_the_operations_of_a_cpu(cpu: Machine) -> None:
    x = torch.ones(64, 64)
    profile = cpu.profile(lambda: [x @ x for _ in range(3)] and None)  # type: ignore[func-returns-value]
    assert profile.kernels >= 3
    assert "aten::mm" in dict(profile.longest)
    assert 0 < max(seconds for _, seconds in profile.longest) <= profile.seconds < 10


def average(key: str, device: DeviceType, count: int, microseconds: float, *, is_note: bool = False) -> Any:
    """Returns the events of one name in a profile."""
    found = FunctionEventAvg()
    found.key, found.device_type, found.count, found.is_user_annotation = key, device, count, is_note
    found.self_device_time_total = microseconds  # type: ignore[assignment]
    return found


def test_profile_of_a_gpu_has_its_kernels_and_the_calls_of_the_host(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    averages = [
        average("gemm", DeviceType.CUDA, 2, 300.0),
        average("copy", DeviceType.CUDA, 1, 100.0),
        average("Memcpy HtoD (Pinned -> Device)", DeviceType.CUDA, 1, 50.0),
        average("part of the program", DeviceType.CUDA, 1, 900.0, is_note=True),
        average("aten::mm", DeviceType.CPU, 2, 0.0),
        average("cudaLaunchKernel", DeviceType.CPU, 3, 0.0),
        average("cudaGraphLaunch", DeviceType.CPU, 1, 0.0),
        average("cudaEventQuery", DeviceType.CPU, 5, 0.0),
    ]
    calls: list[object] = []

    @contextmanager
    def fake_profile(activities: object) -> Iterator[SimpleNamespace]:
        calls.append(activities)
        yield SimpleNamespace(key_averages=lambda: averages)

    monkeypatch.setattr(machine_module, "CUPTI_VARIABLES", {})
    monkeypatch.setattr(machine_module, "profile", fake_profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("wait"))
    gpu = Gpu(torch.device("cuda"), torch.bfloat16, {"default": tiny})
    profile = gpu.profile(lambda: calls.append("work"))
    assert calls == ["wait", Gpu.activities, "work", "wait"]
    assert (profile.launches, profile.kernels) == (4, 3)
    assert profile.seconds == pytest.approx(400e-6)
    assert dict(profile.longest) == pytest.approx({"gemm": 300e-6, "copy": 100e-6})


def test_synchronisations_are_counted_and_other_warnings_are_not(cpu: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[bool] = []
    monkeypatch.setattr(cpu, "watch_synchronisations", lambda *, on: modes.append(on))
    with cpu.counted_synchronisations() as found:
        for message in (SYNCHRONISATION, "other", SYNCHRONISATION):
            warnings.warn(message, stacklevel=1)
    assert len(found) == 2
    assert modes == [True, False]


def test_memory_is_filled_up_to_the_bytes_that_must_be_left(gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def allocate(size: int, **options: object) -> Tensor:
        sizes.append(size)
        gpu.num_bytes_free -= size
        return torch.zeros(0)

    gpu.num_bytes_free = 80 << 30
    monkeypatch.setattr(machine_module.torch, "empty", allocate)
    blocks = gpu.fill_memory(48 << 20)
    assert len(blocks) == len(sizes) < 100
    assert 48 << 20 <= gpu.num_bytes_free <= 64 << 20


def test_memory_that_another_process_takes_ends_the_filling(gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(size: int, **options: object) -> Tensor:
        raise torch.OutOfMemoryError

    gpu.num_bytes_free = 80 << 30
    monkeypatch.setattr(machine_module.torch, "empty", refuse)
    assert gpu.fill_memory(48 << 20) == []


def test_machine_without_a_gpu_is_a_cpu_and_skips_gpu_sections(tiny: Path) -> None:
    options = Options(tiny, "cpu")
    assert not open_machine(options).is_gpu
    with pytest.raises(Skipped, match="no GPU"):
        open_gpu(options)
    with pytest.raises(Skipped, match="no GPU"):
        open_machine(options).runner("graph")
