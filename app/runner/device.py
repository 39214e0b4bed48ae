"""Chooses the device and the precision, and translates the errors of PyTorch's devices."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import torch

from app.engine.interface import DeviceLostError, OutOfMemoryError, RunnerError
from app.runner.threads import ComputeThreads
from model.precision import fast_dtype

log = logging.getLogger(__name__)

MAX_PLAIN_THREADS = 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The kernel module's own file. A container sees it too, whether or not it was given a GPU.
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # version 2
CUDA_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation

# Parts of the messages of torch and of CUDA, and what to say instead. The first match counts.
_NO_GPU = "no GPU is visible. In a container, start it with --gpus all. Without a GPU, set UNFOG_DEVICE=cpu"
_ABSENT = {
    "not compiled with CUDA": "PyTorch {torch} is built without CUDA. Install a CUDA build, or set UNFOG_DEVICE=cpu",
    "Found no NVIDIA driver": _NO_GPU,
    "No CUDA GPUs are available": _NO_GPU,
    "no CUDA-capable device": _NO_GPU,
}
_UNUSABLE = {
    "driver on your system is too old": "the NVIDIA driver is too old for PyTorch {torch} (CUDA {cuda}). "
    "Update the driver, or install a PyTorch build for an older CUDA",
    "no kernel image is available": "PyTorch {torch} does not support this GPU's compute capability. "
    "Install a PyTorch build that does, or set UNFOG_DEVICE=cpu",
    "forward compatibility": "this GPU does not support CUDA's forward compatibility. Update the NVIDIA driver, or "
    "remove the package cuda-compat",
    "unsupported display driver": "the NVIDIA driver's libraries and its kernel module have different versions. "
    "Restart the machine, or install the driver again",
    "busy or unavailable": "another process has exclusive use of the GPU. End it, or set the GPU's compute mode to "
    "Default",
    "out of memory": "the GPU has no free memory. End other processes on it, or choose another GPU with cuda:N",
    "driver initialization failed": "the NVIDIA driver does not start. See what nvidia-smi says",
    "CUDA unknown error": "the NVIDIA driver does not start. See what nvidia-smi says, and check CUDA_VISIBLE_DEVICES",
}


def choose_device(name: str) -> torch.device:
    """Returns the device for `UNFOG_DEVICE`. For `auto`, this is the GPU if it works, else the CPU.

    A GPU is tested with a small computation and becomes the current one of the calling thread. Call this function in
    the thread that computes. RunnerError if the named GPU cannot be used.
    """
    if name == "cpu":
        return torch.device(name)
    device = torch.device("cuda" if name == "auto" else name)
    try:
        _open_gpu(device)
    except (RuntimeError, AssertionError) as error:  # torch's own errors are RuntimeErrors
        reason = _reason(str(error))
        if name != "auto":
            raise RunnerError(f"UNFOG_DEVICE={name}: {reason}") from error
        if NVIDIA_DRIVER.exists() or not any(part in str(error) for part in _ABSENT):
            log.warning("GPU not usable, using the CPU", extra={"reason": reason})
        return torch.device("cpu")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Returns the precision for `UNFOG_DTYPE`; RunnerError for float16 on a CPU. `auto` is the fastest precision."""
    if name == "auto":
        return fast_dtype(device)
    if name == "float16" and device.type != "cuda":
        raise RunnerError("UNFOG_DTYPE=float16 needs a GPU. On a CPU use float32, bfloat16 or auto")
    return DTYPES[name]


def choose_num_threads(
    wanted: int | None, device: torch.device, dtype: torch.dtype, *, compiled: bool
) -> ComputeThreads:
    """Returns the compute threads of a CPU: `wanted`, or one for each core. One fewer is used while a core is busy.

    Uncompiled float32 gets at most two threads by default. With more threads, torch's GELU computes the end of each
    thread's share with scalar code, so that the last bits of a row depend on its place in the batch.
    """
    most = torch.get_num_threads()
    if granted := granted_cores():
        most = min(most, math.ceil(granted))
    if (device.type, dtype, compiled) == ("cpu", torch.float32, False):
        most = min(most, MAX_PLAIN_THREADS)
        if wanted and wanted > MAX_PLAIN_THREADS:
            log.warning(
                "float32 without compilation is reproducible only with 1 or 2 threads", extra={"threads": wanted}
            )
    may_vary = device.type == "cpu" and most > 1 and not wanted
    threads = ComputeThreads((most, most - 1) if may_vary else (wanted or most,))
    threads.set(threads.counts[0])
    return threads


def granted_cores(groups: Path = CGROUPS, own_group: Path = OWN_CGROUP) -> float | None:
    """Returns the CPU limit of this process (of a container or a systemd unit), in cores; None without a limit."""
    folders = (groups / str(group).lstrip("/") for group in _own_groups(own_group))
    return min((cores for folder in folders if (cores := _limit(folder)) is not None), default=None)


@contextmanager
def device_errors() -> Iterator[None]:
    """Translates torch's errors about the device into OutOfMemoryError and DeviceLostError."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemoryError from error
    except torch.AcceleratorError as error:
        if getattr(error, "error_code", None) == CUDA_OUT_OF_MEMORY:  # such as that of a kernel loaded at first use
            raise OutOfMemoryError from error
        raise DeviceLostError(str(error).splitlines()[0]) from error


def _open_gpu(device: torch.device) -> None:
    """Selects the GPU for the calling thread and computes on it; RunnerError if there is no GPU of this number."""
    torch.cuda.init()  # raises for an old driver, with which device_count() succeeds
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise RunnerError(f"UNFOG_DEVICE={device}: there is no such GPU. Visible GPUs: {count}, numbered from 0")
    torch.cuda.set_device(device.index or 0)
    # float32 means float32: by default torch computes convolutions in TF32 on Ampere and newer. These are the older
    # names of two settings. Setting only the newer ones (fp32_precision) makes every reader of the older ones raise.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    (torch.ones(1, device=device) + 1).item()  # fails where torch has no code for this GPU, or no memory is left


def _reason(message: str) -> str:
    """Returns why the GPU cannot be used and what to do about it, in one line."""
    for part, reason in (_ABSENT | _UNUSABLE).items():
        if part in message:
            return reason.format(torch=torch.__version__, cuda=torch.version.cuda)
    return f"the GPU cannot be used: {message.splitlines()[0] if message else 'no reason given'}"


def _own_groups(own_group: Path) -> list[PurePosixPath]:
    """Returns the control group of the process and those above it. Each of them may have a limit."""
    try:
        lines = own_group.read_text().splitlines()
    except OSError:
        return []
    own = [PurePosixPath(line.removeprefix("0::")) for line in lines if line.startswith("0::")]
    return [group for lowest in own for group in (lowest, *lowest.parents)]


def _limit(folder: Path) -> float | None:
    """Returns the limit of a control group in cores; None without one.

    Its file has `QUOTA PERIOD`, both in microseconds, or `max PERIOD`.
    """
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):  # the root group has no such file
        return None
