"""Compiles the reverse step ahead of time, caches the result as a shared library, and loads it at later starts.

torch.compile compiles in the running process, so a start would need a C++ compiler and about half a minute. Here the
work is done ahead of time, once per machine: torch.export traces the step into a graph, AOTInductor (torch's
ahead-of-time compiler) generates C++ code from the graph, and the C++ compiler builds a shared library from the code.

- Program: in bfloat16 the library computes the whole step for any number of rows. In float32, and for pipelines of
  diffusers, it computes only the network, because there each network call has the same number of rows
  (model/precision.py).
- Cache: the library is stored without weights, so checkpoints of the same architecture share it. Its file name is a
  hash of everything that affects its code: architecture, dtypes, torch, processor, options and the sources of this
  package. The C++ compiler is not part of it, because a start with a cached library must not need one.
- Trust: the library is machine code, so files that other users could have written are refused (private_cache.py).
  Inductor works in a private temporary folder for the same reason.
- Check: the file ends with a digest, which detects damage. The first call of a new library runs in a child process
  (child.py), where its results are compared with the step without compilation. A crash there cannot end the service.
- Failure: an unusable library is compiled again. If that fails too, `compiled_step` raises CompilerError. With
  UNFOG_COMPILE=auto the service then runs without compilation, with UNFOG_COMPILE=on it does not start.

On a GPU, torch.compile is used instead, and compiles during the first calls. The runner captures these calls in CUDA
graphs.
"""

import ctypes
import hashlib
import logging
import os
import platform
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from zipfile import ZipFile

import torch
from torch import Tensor, nn
from torch.export import Dim

from model.compiled.child import ChildError, call_in_child
from model.compiled.native import NativeProgram
from model.compiled.packing import Packer, can_pack, take_packed_weights
from model.compiled.private_cache import compile_variables, open_private, private_folder, use_private_compile_cache
from model.files import write_atomically
from model.pipelines.step import PipelineStep
from model.precision import can_compile, no_compiler
from model.sampler import PLAN_COLUMNS
from model.step import ReverseStep, Rows, State, Step, Stepped

log = logging.getLogger(__name__)

OPTIONS = {
    "cpp.dynamic_threads": True,  # use the number of threads at run time
    "compile_threads": 1,  # one program does not need a pool of compiler processes
    "always_keep_tensor_constants": True,  # do not write small weights into the code as literals
    "aot_inductor.package_constants_in_so": False,  # keep weights out of the library; each program would copy them
    "aot_inductor.precompile_headers": False,  # precompiling takes a quarter of the total time
}

RECOMPILE_LIMIT = 64  # GPU only: recompilations per function, for all networks together
# GPU only: the largest number of kernels that are compiled at the same time. By default, torch compiles 32 on a machine
# with 32 cores. CUDA's assembler takes up to 0.9 GiB for a kernel of the shipped network (measured for sm_90). The
# memory limits in docker-compose.yml and deploy/kubernetes/gpu allow for it.
MOST_COMPILERS = 4
GPU_FOLDER = "gpu"  # subfolder of the cache; a container mounts a separate file system there
DIGEST_BYTES = hashlib.sha256().digest_size  # appended to the library; the dynamic loader ignores it
COMPILE_SECONDS = 1800  # timeout; compilation takes half a minute on an idle machine
FIRST_CALL_SECONDS = 60  # timeout; the call takes milliseconds on an idle machine
START_SECONDS = 240  # timeout for a child process to import torch, which takes 3 s on an idle machine
TOLERANCE = 0.1  # maximum mean absolute difference from the step without compilation, for pixels in [-1, 1]

Program = ReverseStep | PipelineStep
_checked: set[str] = set()  # keys of libraries that this process has checked in a child process


class CompilerError(Exception):
    """The step cannot be compiled. The message is one line with the reason."""


class LibraryError(Exception):
    """A compiled library cannot be used. The message is the reason, in one line."""


def compiled_step(program: Program, cache: Path) -> Step:
    """Returns the compiled step: loads it from the cache, or compiles it if it is missing or unusable.

    On a GPU the returned step compiles during its first calls, and these calls can raise CompilerError too. Raises
    CompilerError if the step cannot be compiled. If the cache folder cannot be used, logs a warning and compiles.
    """
    if program.device.type != "cpu":
        return _compiled_for_gpu(program, cache)
    library, reason = _cached_library(program, cache), None
    if library:
        try:
            return load(program, library)
        except FileNotFoundError:
            pass
        except (OSError, AttributeError, KeyError, RuntimeError, LibraryError) as error:
            reason = str(error) or type(error).__name__
    if not can_compile():
        unusable = f"{library} cannot be used: {reason}. Compiling it again" if reason else "compiling"
        raise CompilerError(f"{unusable} {no_compiler()}")
    if reason:
        log.warning("Discarding compiled step, recompiling", extra={"path": str(library), "reason": reason})
    try:
        return _store_and_load(program, build(program), library)
    except Exception as error:  # for example a full disk, an incompatible compiler or an error in torch
        raise CompilerError(f"compiling failed: {error}".splitlines()[0]) from error


def _cached_library(program: Program, cache: Path) -> Path | None:
    """Returns the path of the library in the cache. If the cache cannot be used, logs a warning and returns None."""
    try:
        return library_of(program, private_folder(cache))
    except OSError as error:
        log.warning(
            "Cache folder not usable, each start recompiles",
            extra={
                "path": str(cache),
                "reason": str(error),
                "remedy": "Use a folder that only this user can write to",
            },
        )
        return None


def _compiled_for_gpu(program: Program, cache: Path) -> Step:
    """Returns the step for a GPU, compiled by torch.compile.

    torch compiles one program for all batch sizes except 1. Kernels are cached in `cache`/gpu.
    """
    try:
        use_private_compile_cache(cache / GPU_FOLDER)
    except OSError as error:
        raise CompilerError(f"no folder for compiled kernels can be created: {error}") from error
    with _quiet():  # The import is here because it creates the folder of the cache.
        import torch._inductor.config
        from torch._dynamo.exc import TorchDynamoException

    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, RECOMPILE_LIMIT)  # the limit for all networks together
    limits.fail_on_recompile_limit_hit = True  # By default, torch continues without compilation.
    kernels = torch._inductor.config
    kernels.compile_threads = min(kernels.compile_threads or MOST_COMPILERS, MOST_COMPILERS)
    compiled = torch.compile(program.forward, dynamic=True)

    def step(state: State, plans: Tensor, rows: Rows) -> Stepped:
        try:
            return compiled(state, plans, rows)
        except TorchDynamoException as error:
            raise CompilerError(f"compiling failed: {error}".splitlines()[0]) from error

    return step


def library_of(program: Program, folder: Path) -> Path:
    """Returns the path of the compiled step in a folder. The file does not need to exist."""
    facts = (
        program.architecture,
        {name: (tensor.shape, tensor.dtype, tensor.device) for name, tensor in program.state_dict().items()},
        torch.__version__,
        platform.machine(),
        _processor_features(),
        _digest_of_sources(),
        OPTIONS,
    )
    return folder.resolve() / f"step-{hashlib.sha256(repr(facts).encode()).hexdigest()[:20]}.so"


def build(program: Program) -> bytes:
    """Compiles the step in a child process. Returns the content of the library followed by its digest.

    Inductor loads and runs files from its cache, its precompiled headers and its processor tests, by default in a
    folder of /tmp with a predictable name. In the child process all of them, and the temporary files of the compiler,
    are in a private folder, which is deleted afterwards. Compilation needs a C++ compiler and takes about half a
    minute. Raises OSError or ChildError if it fails.
    """
    start = time.monotonic()
    log.info("Compiling step", extra={"expected_seconds": "30-60"})
    with tempfile.TemporaryDirectory(prefix="unfog-") as folder:
        variables = {**compile_variables(Path(folder, "cache")), "TMPDIR": folder, "PYTHONSAFEPATH": "1"}
        arguments = program, torch.get_num_threads(), OPTIONS, Path(folder, "step.so")
        call_in_child(compile_to_file, *arguments, seconds=COMPILE_SECONDS, variables=variables)
        code = Path(folder, "step.so").read_bytes()
    log.info("Compiled step", extra={"seconds": round(time.monotonic() - start)})
    return code + hashlib.sha256(code).digest()  # one file can be written atomically


def compile_to_file(program: Program, threads: int, options: dict[str, bool | int], library: Path) -> None:
    """Compiles the step in this process and writes the library. The environment determines Inductor's folders."""
    torch.set_num_threads(threads)  # Inductor splits loops for this number of threads
    with _quiet(), torch.no_grad():
        exported = _export_denoise(program) if program.call_rows.most else _export_step(program)
        # torch 2.13 copies stack traces into C++ raw strings, which a `)"` in a line of our code would end.
        for node in exported.graph.nodes:
            node.meta.pop("stack_trace", None)
        package = torch._inductor.aoti_compile_and_package(
            exported, package_path=str(library.with_suffix(".pt2")), inductor_configs=options
        )
        with ZipFile(package) as content:
            (name,) = (name for name in content.namelist() if name.endswith(".so"))
            library.write_bytes(content.read(name))


def _store_and_load(program: Program, content: bytes, library: Path | None) -> Step:
    """Writes the library to the cache and loads it. Uses a temporary folder if the cache is read-only or noexec."""
    if library:
        try:
            write_atomically(library, content)
            return load(program, library)
        except LibraryError:
            library.unlink(missing_ok=True)
            raise
        except OSError as error:
            log.warning(
                "Compiled step not usable from the cache, each start recompiles",
                extra={"path": str(library), "reason": str(error)},
            )
    with tempfile.TemporaryDirectory(prefix="unfog-") as folder:
        library = Path(folder, "step.so")
        write_atomically(library, content)
        return load(program, library)


def load(program: Program, library: Path) -> Step:
    """Checks a library, loads it into this process and returns its step.

    The file is opened once. The digest, the first call in a child process and the loader all use the same descriptor,
    so replacing the file has no effect. Raises OSError if the file is missing or not private, LibraryError if it is
    damaged or its first call fails, and AttributeError, KeyError or RuntimeError if it is not a compiled step.
    """
    descriptor = open_private(library)
    try:
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            content = file.read()
        digest = hashlib.sha256(content[:-DIGEST_BYTES]).digest()
        if digest != content[-DIGEST_BYTES:]:
            raise LibraryError("its content does not match its digest")
        _check_first_call(program, library, descriptor, digest)
    except BaseException:
        os.close(descriptor)
        raise
    # The descriptor stays open. Otherwise a later library could get the same /proc/self/fd path, and the loader would
    # return this library for it.
    return _open_library(program, _path_of(descriptor, library))


def _check_first_call(program: Program, library: Path, descriptor: int, digest: bytes) -> None:
    """Calls the library in a child process. Skips this if an earlier success is recorded in the `.checked` file.

    Raises LibraryError if the call fails.
    """
    key, checked = _key_of(digest), library.with_suffix(".checked")
    if key in _checked or _read_private(checked) == key:
        return
    log.info("Checking compiled step in a child process", extra={"path": str(library)})
    arguments = program, torch.get_num_threads(), descriptor, library, FIRST_CALL_SECONDS
    seconds = START_SECONDS + FIRST_CALL_SECONDS
    try:
        call_in_child(first_call, *arguments, seconds=seconds, descriptors=(descriptor,))
    except ChildError as error:
        raise LibraryError(f"its first call failed: {error}") from error
    _checked.add(key)
    with suppress(OSError):  # in a read-only folder, the next process repeats the check
        write_atomically(checked, key.encode())


def first_call(program: Program, threads: int, descriptor: int, library: Path, seconds: int) -> None:
    """Compares one step of the library with the step without compilation. Runs in the child process.

    Raises LibraryError if the results differ. SIGALRM ends the process after `seconds`.
    """
    torch.set_num_threads(threads)
    signal.alarm(seconds)  # A Python handler would never run during an endless loop in native code.
    inputs = _small_step(program)
    with torch.inference_mode():
        expected = program(*inputs)
        found = _open_library(program, _path_of(descriptor, library))(*inputs)
    for one, other in zip(found, expected, strict=True):
        largest = TOLERANCE * max(1.0, other.float().abs().mean().item())  # an error is a sum over pixels
        if one.shape != other.shape or not (one.float() - other.float()).abs().mean() <= largest:
            raise LibraryError("its results differ from those of the step without compilation")


def _small_step(program: Program) -> tuple[State, Tensor, Rows]:
    """Returns inputs for a step of three rows, two of which are guided. The third has known pixels."""
    state, rows = State.zeros(3, program.image_shape, program.device), torch.arange(3)
    state.x_t = torch.randn(state.x_t.shape, generator=torch.Generator().manual_seed(0))
    state.known = torch.rand(state.x_t.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    state.is_known = torch.zeros_like(state.x_t, dtype=torch.bool)
    state.is_known[2, :, ::2] = True  # every second line
    slot, null = torch.cat([rows, rows[:2]]), program.null_label
    label = torch.tensor([0, 1, 2, null, null]).clamp(max=null)
    taken = Rows(slot, torch.zeros_like(slot), label, torch.zeros_like(rows), torch.tensor([3, 4, 2]))
    return state, program.example_plan(), taken


def _key_of(digest: bytes) -> str:
    """Returns a hash of everything that affects the first call: library, torch, Python, C library and processor."""
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    size = torch_library.stat().st_size if torch_library.exists() else None
    versions = torch.__version__, torch.version.git_version, size, sys.version, platform.libc_ver()
    return hashlib.sha256(repr((digest, versions, _processor_features())).encode()).hexdigest()


def _read_private(path: Path) -> str | None:
    """Returns the text of a file, or None if it does not exist or other users could have written it."""
    try:
        descriptor = open_private(path)
    except OSError:
        return None
    with os.fdopen(descriptor, errors="replace") as file:
        return file.read(1024)


def _path_of(descriptor: int, library: Path) -> str:
    """Returns a path that opens the already open file again. Without /proc, returns the path of the library."""
    path = f"/proc/self/fd/{descriptor}"
    return path if Path(path).exists() else str(library)


def _open_library(program: Program, path: str) -> Step:
    """Loads a library into this process and connects it to the weights of `program`. Returns its step.

    With a fixed number of rows per call (float32) the library contains only the network, otherwise the whole step.
    """
    native, flat = ctypes.CDLL(path), FlatStep(program)
    constants = flat.state_dict()
    if program.call_rows.most:
        compiled = NativeProgram(native, constants, num_outputs=1)
        program.denoise = lambda x_t, c: compiled(x_t, c)[0]
        return program
    if isinstance(program, ReverseStep) and can_pack(program.device, program.dtype):
        return _PackedStep(flat, program, native)
    whole = NativeProgram(native, constants, num_outputs=len(Stepped._fields))
    return lambda state, plans, rows: Stepped(*whole(*state, plans, *rows))


class FlatStep(nn.Module):
    """The step with all tensors as positional arguments, which compiled programs need."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Returns the tensors of Stepped. `tensors` are those of a State, the plans, and those of Rows, in this order.

        A plain tuple is returned, because torch.export cannot store named tuples.
        """
        num_rows = len(Rows._fields)
        *state, plans = tensors[:-num_rows]
        return tuple(self.program(State(*state), plans, Rows(*tensors[-num_rows:])))


class _PackedStep:
    """The compiled step with packed weights (packing.py).

    The best weight layout depends on the number of evaluations in a call and on the number of threads. There is one
    program for each combination. All of them share the library.
    """

    def __init__(self, flat: FlatStep, program: ReverseStep, library: ctypes.CDLL) -> None:
        self._library, self._constants = library, flat.state_dict()
        self._packer = Packer(flat, program.run_network_once)
        self._programs: dict[tuple[int, int], NativeProgram] = {}
        self._program_for(torch.get_num_threads())  # An unusable library raises here and not at the first step.

    def __call__(self, state: State, plans: Tensor, rows: Rows) -> Stepped:
        """Computes one step, with the arguments and the result of ReverseStep."""
        return Stepped(*self._program_for(len(rows.slot))(*state, plans, *rows))

    def _program_for(self, evaluations: int) -> NativeProgram:
        """Returns the program for this number of evaluations.

        oneDNN chooses the same layout for all numbers of evaluations from the number of threads upwards.
        """
        threads = torch.get_num_threads()
        rows = min(evaluations, threads)
        if (threads, rows) not in self._programs:
            constants = self._constants | self._packer.weights_for(rows)
            self._programs[threads, rows] = NativeProgram(self._library, constants, num_outputs=len(Stepped._fields))
        return self._programs[threads, rows]


def _export_step(program: Program) -> torch.export.ExportedProgram:
    """Exports the whole step for any number of rows."""
    B, N = 8, 11  # torch.export specializes on sizes 0 and 1, and treats equal sizes as one dimension
    state = State.zeros(2 * B, program.image_shape, program.device)
    plans = torch.zeros(4, PLAN_COLUMNS, device=program.device)
    indices = [torch.arange(n, device=program.device) % B for n in (N, N, N, B, B)]  # the fields of Rows
    rows, evaluations = Dim("B", min=1), Dim("N", min=1)
    of_rows = {0: evaluations}, {0: evaluations}, {0: evaluations}, {0: rows}, {0: rows}
    shapes = (*({0: Dim.DYNAMIC} for _ in state), {0: Dim.DYNAMIC}, *of_rows)
    inputs = (*state, plans, *indices)
    exported = torch.export.export(FlatStep(program), inputs, dynamic_shapes=(shapes,))
    return take_packed_weights(exported) if can_pack(program.device, program.dtype) else exported


class _Denoise(nn.Module):
    """The network only, for devices where every call has the same number of rows."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program

    def forward(self, x_t: Tensor, c: Tensor) -> Tensor:
        return self.program.denoise(x_t, c)


def _export_denoise(program: Program) -> torch.export.ExportedProgram:
    rows = program.call_rows.most
    assert rows, "the number of rows must be fixed"
    return torch.export.export(_Denoise(program), program.example_call(rows))


def _processor_features() -> str:
    """Returns the instruction set extensions of the processor. The generated code uses all of them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _digest_of_sources() -> str:
    """Returns a hash of all sources of this package, because most of them affect the compiled code or its interface."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses warnings. torch raises warnings about its own code while it compiles."""
    with warnings.catch_warnings(action="ignore"):
        yield
