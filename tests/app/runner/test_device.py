"""Tests of the choice of device, precision and threads. GPUs are simulated by replacing functions of torch.cuda."""

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from app.engine.interface import DeviceLostError, OutOfMemoryError, RunnerError
from app.runner.device import (
    MAX_PLAIN_THREADS,
    choose_device,
    choose_dtype,
    choose_num_threads,
    device_errors,
    granted_cores,
)
from tests.app.fakes import WAIT_SECONDS, FakeRunner, new_engine, new_job, running

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NO_DRIVER = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver"
OLD_DRIVER = "The NVIDIA driver on your system is too old (found version 12080). Please update your GPU driver by"
UNEXPECTED = "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before? Error"
# (error of torch, a part of our message). The errors were observed with the CUDA runtime and a simulated driver.
INIT_ERRORS = [
    (AssertionError("Torch not compiled with CUDA enabled"), "is built without CUDA"),
    (RuntimeError(NO_DRIVER), "no GPU is visible. Start a container with --gpus all"),
    (RuntimeError("No CUDA GPUs are available"), "no GPU is visible"),
    (RuntimeError(OLD_DRIVER), "driver is too old for PyTorch"),
    (RuntimeError(f"{UNEXPECTED} 804: forward compatibility was attempted on non supported HW"), "forward compat"),
    (RuntimeError(f"{UNEXPECTED} 803: system has unsupported display driver / cuda driver combination"), "versions"),
    (RuntimeError(f"{UNEXPECTED} 46: CUDA-capable device(s) is/are busy or unavailable"), "exclusive use"),
    (RuntimeError("CUDA driver initialization failed, you might not have a CUDA gpu."), "nvidia-smi"),
    (RuntimeError("CUDA unknown error - this may be due to an incorrectly set up environment"), "nvidia-smi"),
    (RuntimeError("something new\nwith a second line"), "the GPU cannot be used: something new"),
    (RuntimeError(), "the GPU cannot be used"),
]
COMPUTE_ERRORS = [
    (torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device\nx"), "capability"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."), "no free memory"),
    (torch.AcceleratorError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"), "no free memory"),
]


@pytest.fixture(autouse=True)
def no_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Returns the path at which the code looks for the file of the NVIDIA driver. The file does not exist."""
    monkeypatch.setattr("app.runner.device.NVIDIA_DRIVER", tmp_path / "version")
    return tmp_path / "version"


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Simulates two working GPUs. Returns a list of (thread name, GPU number) for each selection of a GPU."""
    selected: list[tuple[str, int]] = []
    ones = torch.ones

    def set_device(device: int) -> None:
        selected.append((threading.current_thread().name, device))

    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))
    return selected


@pytest.fixture(autouse=True)
def torch_defaults() -> Iterator[None]:
    """Restores torch's process-wide settings of TF32 and of attention."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    is_cudnn_attention_on = torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    torch.backends.cuda.enable_cudnn_sdp(is_cudnn_attention_on)


def raising(error: Exception) -> Any:
    def fail(*args: object, **named: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(("error", "expected"), INIT_ERRORS)
def test_error_is_one_line_if_the_gpu_does_not_initialize(
    monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str
) -> None:
    """torch's device_count() uses NVML, so that it succeeds even if the driver is too old."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "init", raising(error))
    with pytest.raises(RunnerError) as raised:
        choose_device("cuda")
    message = str(raised.value)
    assert message.startswith("UNFOG_DEVICE=cuda: ")
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(("error", "expected"), COMPUTE_ERRORS)
def test_error_is_one_line_if_the_gpu_does_not_compute(
    monkeypatch: pytest.MonkeyPatch, gpus: list[tuple[str, int]], error: Exception, expected: str
) -> None:
    monkeypatch.setattr(torch, "ones", raising(error))
    with pytest.raises(RunnerError, match=f"UNFOG_DEVICE=cuda:1: .*{expected}") as raised:
        choose_device("cuda:1")
    assert "\n" not in str(raised.value)


def test_error_for_an_old_driver_has_the_versions_and_the_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "init", raising(RuntimeError(OLD_DRIVER)))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    with pytest.raises(RunnerError, match=r"PyTorch 2\.13\.0\+cu130 \(CUDA 13\.0\)\. Update the driver, or install"):
        choose_device("cuda")


def test_error_for_an_unknown_gpu_number_has_the_number_of_gpus(gpus: list[tuple[str, int]]) -> None:
    with pytest.raises(RunnerError, match=r"UNFOG_DEVICE=cuda:2: no GPU has this number\. Visible GPUs: 2"):
        choose_device("cuda:2")
    assert gpus == []


@pytest.mark.parametrize(("name", "number"), [("cuda", 0), ("cuda:1", 1), ("auto", 0)])
def test_gpu_is_selected_in_the_thread_that_runs_the_steps(gpus: list[tuple[str, int]], name: str, number: int) -> None:
    chosen, step_threads = list[torch.device](), list[str]()
    runner = FakeRunner(on_step=lambda rows: step_threads.append(threading.current_thread().name))
    engine, job = new_engine(runner), new_job()
    engine.loop._load = lambda: chosen.append(choose_device(name)) or runner  # type: ignore[func-returns-value]
    with running(engine):
        engine.ready.result(WAIT_SECONDS)
        engine.submit(job)
        job.future.result(WAIT_SECONDS)
    assert chosen == [torch.device("cuda" if name == "auto" else name)]
    assert gpus == [(step_threads[0], number)]
    assert step_threads[0] != threading.current_thread().name


def test_float32_on_a_gpu_does_not_use_tf32(gpus: list[tuple[str, int]]) -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    choose_device("cuda")
    assert torch.backends.cudnn.conv.fp32_precision != "tf32"
    assert torch.backends.cuda.matmul.fp32_precision != "tf32"
    assert not torch.backends.cudnn.allow_tf32  # This read raises if the older and the newer settings disagree.


def test_attention_on_a_gpu_does_not_use_cudnn(gpus: list[tuple[str, int]]) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    choose_device("cuda")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()


def test_auto_without_a_gpu_selects_the_cpu_without_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "init", raising(RuntimeError(NO_DRIVER)))
    assert choose_device("auto") == CPU
    assert caplog.records == []


@pytest.mark.parametrize(
    ("error", "has_driver", "reason"),
    [
        (RuntimeError(OLD_DRIVER), False, "driver is too old"),  # WSL does not have the file of the driver.
        (RuntimeError("No CUDA GPUs are available"), True, "--gpus all"),  # a container without a GPU
        (AssertionError("Torch not compiled with CUDA enabled"), True, "Install a CUDA build"),
    ],
)
def test_auto_with_an_unusable_gpu_selects_the_cpu_with_a_warning(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    no_driver: Path,
    error: Exception,
    has_driver: bool,
    reason: str,
) -> None:
    if has_driver:
        no_driver.touch()
    monkeypatch.setattr(torch.cuda, "init", raising(error))
    assert choose_device("auto") == CPU
    (record,) = caplog.records
    assert (record.levelno, record.getMessage()) == (logging.WARNING, "GPU not usable, using the CPU")
    assert reason in vars(record)["reason"]


def test_device_cpu_does_not_call_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "init", raising(AssertionError("called")))
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16), ((6, 1), torch.float32)],
)
def test_auto_precision_of_a_gpu_follows_from_its_compute_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: torch.dtype
) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or capability)
    assert choose_dtype("auto", torch.device("cuda:1")) is expected
    assert asked == [torch.device("cuda:1")]


def test_float16_is_accepted_on_a_gpu_and_rejected_on_a_cpu() -> None:
    assert choose_dtype("float16", CUDA) is torch.float16
    with pytest.raises(RunnerError, match="UNFOG_DTYPE=float16 needs a GPU"):
        choose_dtype("float16", CPU)


@pytest.mark.parametrize(("code", "translated"), [(2, OutOfMemoryError), (700, DeviceLostError)])
def test_device_error_with_the_out_of_memory_code_is_not_a_lost_device(code: int, translated: type[Exception]) -> None:
    """CUDA itself can run out of memory outside of torch's allocator, for example when it loads a kernel."""
    error = torch.AcceleratorError("CUDA error: out of memory")
    error.error_code = code  # type: ignore[attr-defined] # torch sets this attribute.
    with pytest.raises(translated), device_errors():
        raise error


# Messages of torch 2.13 for errors of cuDNN and cuBLAS. Their type is RuntimeError.
NO_ENGINE = "GET was unable to find an engine to execute this computation"
NO_MEMORY = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
NOT_RUN = "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasLtMatmul`"
LOST = torch.AcceleratorError("CUDA error: device-side assert triggered\nCompile with TORCH_USE_CUDA_DSA")


@pytest.mark.parametrize(
    ("message", "lost", "translated"),
    [
        (NO_ENGINE, None, OutOfMemoryError),
        (NO_MEMORY, None, OutOfMemoryError),
        (NO_ENGINE, LOST, DeviceLostError),
        (NOT_RUN, LOST, DeviceLostError),
        (NOT_RUN, None, RuntimeError),
    ],
)
def test_error_of_a_gpu_library_is_a_lost_device_if_the_gpu_no_longer_works_or_a_shortage_of_memory(
    monkeypatch: pytest.MonkeyPatch, message: str, lost: Exception | None, translated: type[Exception]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", raising(lost) if lost else lambda: None)
    with pytest.raises(translated) as raised, device_errors():
        raise RuntimeError(message)
    assert type(raised.value) is translated


def test_error_of_a_bug_is_not_translated_without_a_gpu() -> None:
    with pytest.raises(RuntimeError, match="shape mismatch"), device_errors():
        raise RuntimeError("shape mismatch")


def test_failed_allocation_on_a_cpu_is_a_shortage_of_memory() -> None:
    with pytest.raises(OutOfMemoryError) as raised, device_errors():
        torch.empty(1 << 60, dtype=torch.uint8)  # more than the address space, so no memory is used
    assert type(raised.value.__cause__) is RuntimeError


# Messages of torch 2.13. The first two were observed in steps with a limited address space (RLIMIT_AS).
NO_PRIMITIVE = "could not create a primitive"
IN_COMPILED_STEP = "the compiled step failed in RunSingleThreaded: "
NOT_SUPPORTED = "could not create a primitive descriptor for the reorder primitive. Run workload with environment"


@pytest.mark.parametrize(
    ("message", "translated"),
    [
        (NO_PRIMITIVE, OutOfMemoryError),
        (IN_COMPILED_STEP + NO_PRIMITIVE, OutOfMemoryError),
        ("posix_memalign failed:Cannot allocate memory (12)", OutOfMemoryError),
        ("std::bad_alloc", OutOfMemoryError),
        (NOT_SUPPORTED, RuntimeError),
        (IN_COMPILED_STEP + "expected input vector size to be 5, but got 4", RuntimeError),
    ],
)
def test_error_of_a_cpu_library_is_a_shortage_of_memory_only_if_its_message_is_known(
    message: str, translated: type[Exception]
) -> None:
    with pytest.raises(translated) as raised, device_errors():
        raise RuntimeError(message)
    assert type(raised.value) is translated


@pytest.fixture
def many_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Simulates a machine with 8 cores and without a CPU limit."""
    monkeypatch.setattr("app.runner.device.granted_cores", lambda: None)
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("many_threads")
@pytest.mark.parametrize(
    ("wanted", "dtype", "compiled", "expected"),
    [
        (None, torch.float32, True, 8),
        (None, torch.float32, False, MAX_PLAIN_THREADS),
        (None, torch.bfloat16, False, 8),
        (None, torch.bfloat16, True, 8),
        (1, torch.float32, True, 1),
        (2, torch.float32, True, 2),
        (3, torch.bfloat16, True, 3),
        (3, torch.bfloat16, False, 3),
        (3, torch.float32, True, 3),
    ],
)
def test_uncompiled_float32_uses_at_most_two_threads_by_default(
    wanted: int | None, dtype: torch.dtype, compiled: bool, expected: int
) -> None:
    choose_num_threads(wanted, CPU, dtype, compiled=compiled)
    assert torch.get_num_threads() == expected


@pytest.mark.usefixtures("many_threads")
@pytest.mark.parametrize(("granted", "expected"), [(None, 8), (1.5, 2), (0.5, 1), (16.0, 8)])
def test_number_of_threads_does_not_exceed_the_cpu_limit_of_the_container(
    granted: float | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.runner.device.granted_cores", lambda: granted)
    choose_num_threads(None, CPU, torch.bfloat16, compiled=True)
    assert torch.get_num_threads() == expected


@pytest.mark.usefixtures("many_threads")
@pytest.mark.parametrize(("wanted", "compiled", "lines"), [(2, False, 0), (3, False, 1), (3, True, 0)])
def test_warning_is_logged_if_too_many_threads_prevent_reproducible_results(
    wanted: int, compiled: bool, lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    choose_num_threads(wanted, CPU, torch.float32, compiled=compiled)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * lines
    assert [vars(record)["threads"] for record in caplog.records] == [wanted] * lines


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, None),
        ({"a/b": "max 100000"}, None),
        ({"a/b": "200000 100000"}, 2.0),
        ({"a/b": "max 100000", "a": "150000 100000"}, 1.5),
        ({"a/b": "400000 100000", "a": "100000 100000"}, 1.0),
        ({"": "50000 100000"}, 0.5),
        ({"elsewhere": "100000 100000"}, None),
        ({"a/b": "not a number"}, None),
    ],
)
def test_smallest_limit_of_the_control_group_and_its_parents_applies(
    limits: dict[str, str], expected: float | None, tmp_path: Path
) -> None:
    (tmp_path / "cgroup").write_text("9:name=systemd:/elsewhere\n0::/a/b\n")
    groups = tmp_path / "groups"
    for group, limit in limits.items():
        (groups / group).mkdir(parents=True, exist_ok=True)
        (groups / group / "cpu.max").write_text(f"{limit}\n")
    assert granted_cores(groups, tmp_path / "cgroup") == expected


def test_cpu_limit_is_none_without_control_groups(tmp_path: Path) -> None:
    assert granted_cores(tmp_path, tmp_path / "cgroup") is None
