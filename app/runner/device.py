"""Chooses the device, the precision and the number of threads, and translates PyTorch's device errors."""

import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import torch

from app.engine.interface import DeviceLostError, OutOfMemoryError, RunnerError
from app.runner.threads import ComputeThreads
from model.precision import fast_dtype

log = logging.getLogger(__name__)

MAX_PLAIN_THREADS = 2  # limit for uncompiled float32, see choose_num_threads()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# A file of the NVIDIA kernel module. It is also visible in a container that has no access to the GPU.
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # paths of cgroup v2
CUDA_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
# Matches the messages of RuntimeErrors that report a shortage of memory. On a GPU, torch tries all algorithms of cuDNN
# for a convolution, ignores their errors, and raises the first message if none works. The second one is of cuBLAS and
# cuDNN. On a CPU, the messages are those of torch, NNPACK, C++ and oneDNN. oneDNN gives no reason. If an operation is
# not supported, its message is another one: "could not create a primitive descriptor".
SHORTAGE = re.compile(
    "unable to find an engine to execute this computation|_STATUS_ALLOC_FAILED"
    "|DefaultCPUAllocator: (can't allocate|not enough) memory|posix_memalign failed|std::bad_alloc"
    "|could not create a primitive$"
)

# Parts of error messages of torch and CUDA, each with a message for the operator. The first match is used.
_NO_GPU = "no GPU is visible. Start a container with --gpus all. On a machine without a GPU, set UNFOG_DEVICE=cpu"
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
    "driver initialization failed": "the NVIDIA driver failed to initialize. Run nvidia-smi to see the cause",
    "CUDA unknown error": "the NVIDIA driver failed to initialize. Run nvidia-smi to see the cause, and check "
    "CUDA_VISIBLE_DEVICES",
}


def choose_device(name: str) -> torch.device:
    """Returns the device for `UNFOG_DEVICE`. For `auto`, this is the GPU if it works, otherwise the CPU.

    A GPU is tested with a small computation and becomes the current device of the calling thread. The engine thread
    must therefore call this function. Raises RunnerError if `UNFOG_DEVICE` names a GPU that cannot be used.
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
    """Returns the precision for `UNFOG_DTYPE`. `auto` selects the fastest precision of the device.

    Raises RunnerError for float16 on a CPU.
    """
    if name == "auto":
        return fast_dtype(device)
    if name == "float16" and device.type != "cuda":
        raise RunnerError("UNFOG_DTYPE=float16 needs a GPU. On a CPU, use float32, bfloat16 or auto")
    return DTYPES[name]


def choose_num_threads(
    wanted: int | None, device: torch.device, dtype: torch.dtype, *, compiled: bool
) -> ComputeThreads:
    """Returns the compute threads for a CPU, and sets them in the calling thread.

    If `wanted` is given, this number is fixed. Otherwise the number is one for each core, but at most the CPU limit of
    the container, rounded up. One thread fewer is used while another process uses a core (see threads.py).

    Uncompiled float32 has at most two threads by default. With more threads, torch's GELU computes the end of each
    thread's part with scalar code instead of vector code. The last bits of a row would then depend on its place in the
    batch.

    Example: on 8 cores with a container limit of 1.5 CPUs, compiled bfloat16 has 2 threads, or 1 while a core is busy.
    """
    most = available_threads()
    if (device.type, dtype, compiled) == ("cpu", torch.float32, False):
        most = min(most, MAX_PLAIN_THREADS)
        if wanted and wanted > MAX_PLAIN_THREADS:
            log.warning("Uncompiled float32 is reproducible only with 1 or 2 threads", extra={"threads": wanted})
    may_vary = device.type == "cpu" and most > 1 and not wanted
    threads = ComputeThreads((most, most - 1) if may_vary else (wanted or most,))
    threads.set(threads.counts[0])
    return threads


def available_threads() -> int:
    """Returns one thread for each core, but at most the CPU limit of the container, rounded up."""
    granted = granted_cores()
    return min(torch.get_num_threads(), math.ceil(granted)) if granted else torch.get_num_threads()


def granted_cores(groups: Path = CGROUPS, own_group: Path = OWN_CGROUP) -> float | None:
    """Returns the CPU limit of this process's container or systemd unit in cores, or None without a limit."""
    folders = (groups / str(group).lstrip("/") for group in _own_groups(own_group))
    return min((cores for folder in folders if (cores := _limit(folder)) is not None), default=None)


@contextmanager
def device_errors() -> Iterator[None]:
    """Translates torch's device errors into OutOfMemoryError and DeviceLostError.

    Errors of CUDA have types of their own. Errors of cuBLAS and cuDNN, and a shortage of memory on a CPU, are
    RuntimeErrors, like those of a bug. After a RuntimeError, a wait for the GPU therefore shows whether it still works.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemoryError from error
    except torch.AcceleratorError as error:
        # CUDA itself can run out of memory, for example when it loads a kernel at its first use.
        if getattr(error, "error_code", None) == CUDA_OUT_OF_MEMORY:
            raise OutOfMemoryError from error
        raise DeviceLostError(str(error).splitlines()[0]) from error
    except RuntimeError as error:
        _raise_if_lost(error)
        if SHORTAGE.search(str(error)):
            raise OutOfMemoryError from error
        raise


def _raise_if_lost(error: RuntimeError) -> None:
    """Raises DeviceLostError if the current GPU no longer works. Does nothing if this process uses no GPU."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except torch.AcceleratorError:
            raise DeviceLostError(str(error).partition("\n")[0]) from error


def _open_gpu(device: torch.device) -> None:
    """Selects the GPU in the calling thread and tests it. Raises RunnerError if there is no GPU with this number."""
    torch.cuda.init()  # Raises if the driver is too old. device_count() does not raise then.
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise RunnerError(f"UNFOG_DEVICE={device}: no GPU has this number. Visible GPUs: {count}, numbered from 0")
    torch.cuda.set_device(device.index or 0)
    # By default, torch computes float32 convolutions in TF32 on Ampere and newer, which has fewer bits. These are the
    # older names of the settings. If only the newer ones (fp32_precision) were set, reading the older ones would raise.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    # On Hopper and newer, torch prefers the attention of cuDNN, which builds a plan for each number of rows. This takes
    # about 0.4 s each time (an estimate). The other kernels need no plan.
    torch.backends.cuda.enable_cudnn_sdp(False)
    (torch.ones(1, device=device) + 1).item()  # This raises if torch has no code for this GPU or no memory is free.


def _reason(message: str) -> str:
    """Returns one line for the operator: why the GPU cannot be used, and what to do."""
    for part, reason in (_ABSENT | _UNUSABLE).items():
        if part in message:
            return reason.format(torch=torch.__version__, cuda=torch.version.cuda)
    return f"the GPU cannot be used: {message.splitlines()[0] if message else 'no reason given'}"


def _own_groups(own_group: Path) -> list[PurePosixPath]:
    """Returns the control group of the process and all its parents. Each of them may have a limit."""
    try:
        lines = own_group.read_text().splitlines()
    except OSError:
        return []
    own = [PurePosixPath(line.removeprefix("0::")) for line in lines if line.startswith("0::")]
    return [group for lowest in own for group in (lowest, *lowest.parents)]


def _limit(folder: Path) -> float | None:
    """Returns the CPU limit of a control group in cores, or None without a limit.

    The file cpu.max has the form `QUOTA PERIOD`, both in microseconds, or `max PERIOD`.
    """
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):  # The root control group has no cpu.max.
        return None
