"""Compiles the reverse step ahead of time, once for an architecture and a processor, and loads it at later starts.

The library holds no weights, so that checkpoints of one architecture share it. Its name depends on everything that
changes its bits, except the C++ compiler, which later starts do not need. Since the library is machine code,
private_cache.py refuses files that others could have written, and Inductor works in a private temporary folder. The
first call of a library is made in a child process: after a crash there, the service uses the step without compilation.
"""

import ctypes
import hashlib
import importlib
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
from typing import cast
from zipfile import ZipFile

import torch
from torch import Tensor, nn
from torch.export import Dim

from model.compiled.child import ChildError, call_in_child
from model.compiled.native import NativeProgram
from model.compiled.packing import Packer, can_pack, take_packed_weights
from model.compiled.private_cache import compile_variables, open_private, private_folder, use_private_compile_cache
from model.files import write_atomically
from model.precision import can_compile, no_compiler
from model.step import ReverseStep, Rows, State, Step, Stepped

log = logging.getLogger(__name__)

OPTIONS = {
    "cpp.dynamic_threads": True,  # as many as serve, not as many as compiled
    "compile_threads": 1,  # no pool of processes for one program
    "always_keep_tensor_constants": True,  # no weight is written into the code, however short
    "aot_inductor.package_constants_in_so": False,  # nor beside it: each program would hold a copy
    "aot_inductor.precompile_headers": False,  # they would be used once: making them takes a quarter of the time
}

RECOMPILE_LIMIT = 64
GPU_FOLDER = "gpu"  # below the cache; in a container it is a mount of its own
DIGEST_BYTES = hashlib.sha256().digest_size  # at a library's end, where its loader does not look
COMPILE_SECONDS = 1800  # takes half a minute on an idle machine
FIRST_CALL_SECONDS = 60  # takes milliseconds on an idle machine
START_SECONDS = 240  # until a child process has imported torch, which takes 3 s on an idle machine
TOLERANCE = 0.1  # mean absolute difference of pixels in [-1, 1] to the step that is not compiled, as in warm-up

_checked: set[str] = set()  # keys of libraries whose first call succeeded in a child of this process


class CompilerError(Exception):
    """The step cannot be compiled; one sentence."""


class LibraryError(Exception):
    """The library cannot be used; one sentence."""


def default_cache() -> Path:
    """Where a user's programs keep what they can make again; a user without a home has / for one, as in a shell."""
    try:
        home = Path.home()
    except RuntimeError:
        home = Path("/")
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "unfog"


def compiled_step(program: ReverseStep, cache: Path) -> Step:
    """Loads the step from the cache, or compiles it if it is missing or unusable; CompilerError.

    On a GPU it is compiled by its first calls.
    """
    if program.device.type != "cpu":
        return _compiled_with_graphs(program, cache)
    library, reason = _find(program, cache), None
    if library:
        try:
            return load(program, library)
        except FileNotFoundError:
            pass
        except (OSError, AttributeError, KeyError, RuntimeError, LibraryError) as error:
            reason = f"{library} cannot be used: {error}"
    if not can_compile():
        raise CompilerError("; ".join(filter(None, (reason, f"compiling {no_compiler()}"))))
    if reason:
        log.warning("Discarding compiled step, recompiling: %s", reason)
    try:
        return _keep(program, build(program), library)
    except Exception as error:  # a full disk, an unusual compiler, torch itself
        raise CompilerError(f"compiling failed: {error}".splitlines()[0]) from error


def _find(program: ReverseStep, cache: Path) -> Path | None:
    """The library's path in a private folder; None, and a warning, if the cache cannot be used."""
    try:
        return library_of(program, private_folder(cache))
    except OSError as error:
        log.warning(
            "Cache folder %s cannot be used, so each start compiles: %s. Use a folder that belongs to this user and "
            "that no other user can write to",
            cache,
            error,
        )
        return None


def _compiled_with_graphs(program: ReverseStep, cache: Path) -> Step:
    """The step for a GPU. torch compiles it once for all shapes but 1, and records a graph for each shape it meets."""
    try:
        use_private_compile_cache(cache / GPU_FOLDER)
    except OSError as error:
        raise CompilerError(f"there is no folder for compiled kernels: {error}") from error
    with _quiet():  # imported late: this creates the folder of the compile cache
        importlib.import_module("torch._inductor.cudagraph_trees")  # which the first call would import, with warnings
        from torch._dynamo.exc import TorchDynamoException

    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, RECOMPILE_LIMIT)  # of all networks together
    limits.fail_on_recompile_limit_hit = True  # else it would go on uncompiled
    compiled = torch.compile(FlatStep(program), mode="reduce-overhead", dynamic=True)

    def step(state: State, plans: Tensor, rows: Rows) -> Stepped:
        torch.compiler.cudagraph_mark_step_begin()
        try:
            x_prev, x_0, finite = compiled(*state, plans, *rows)
        except TorchDynamoException as error:
            raise CompilerError(f"compiling failed: {error}".splitlines()[0]) from error
        return x_prev.clone(), x_0.clone(), finite.clone()  # the next call writes where these lie

    return step


def library_of(program: ReverseStep, folder: Path) -> Path:
    """The path of the compiled step in a folder, whether it exists or not."""
    facts = (
        program.checkpoint.config.unet,
        {name: (tensor.shape, tensor.dtype, tensor.device) for name, tensor in program.state_dict().items()},
        torch.__version__,
        platform.machine(),
        _processor_features(),
        _digest_of_sources(),
        OPTIONS,
    )
    return folder.resolve() / f"step-{hashlib.sha256(repr(facts).encode()).hexdigest()[:20]}.so"


def build(program: ReverseStep) -> bytes:
    """Compiles a library in a child process; takes half a minute and a C++ compiler.

    Inductor loads and runs files of its cache, its precompiled headers and its processor tests. In the child all of
    them, and the compiler's temporary files, are in a folder that only this user can read, and that is then removed.
    """
    start = time.monotonic()
    log.info("Compiling the step for this machine, once")
    with tempfile.TemporaryDirectory(prefix="unfog-") as folder:
        variables = {**compile_variables(Path(folder, "cache")), "TMPDIR": folder, "PYTHONSAFEPATH": "1"}
        arguments = program, torch.get_num_threads(), OPTIONS, Path(folder, "step.so")
        call_in_child(compile_to_file, *arguments, seconds=COMPILE_SECONDS, variables=variables)
        code = Path(folder, "step.so").read_bytes()
    log.info("Compiled in %.0f s", time.monotonic() - start)
    return code + hashlib.sha256(code).digest()  # one file, so that a start sees both or neither


def compile_to_file(program: ReverseStep, threads: int, options: dict[str, bool | int], library: Path) -> None:
    """Compiles in this process, with Inductor's caches where its environment says."""
    torch.set_num_threads(threads)  # they decide how loops are split
    with _quiet(), torch.no_grad():
        exported = _export_denoise(program) if program.call_rows.most else _export_step(program)
        for node in exported.graph.nodes:  # torch 2.13 writes them into the code, where a `)"` of ours ends them
            node.meta.pop("stack_trace", None)
        package = torch._inductor.aoti_compile_and_package(
            exported, package_path=str(library.with_suffix(".pt2")), inductor_configs=options
        )
        with ZipFile(package) as content:
            (name,) = (name for name in content.namelist() if name.endswith(".so"))
            library.write_bytes(content.read(name))


def _keep(program: ReverseStep, content: bytes, library: Path | None) -> Step:
    """Writes the library to the cache and loads it; from a temporary folder if the cache cannot be written or run."""
    if library:
        try:
            write_atomically(library, content)
            return load(program, library)
        except LibraryError:
            library.unlink(missing_ok=True)
            raise
        except OSError as error:
            log.warning("%s cannot be used, so each start compiles: %s", library, error)
    with tempfile.TemporaryDirectory(prefix="unfog-") as folder:
        library = Path(folder, "step.so")
        write_atomically(library, content)
        return load(program, library)


def load(program: ReverseStep, library: Path) -> Step:
    """The step that the library holds. OSError, RuntimeError or LibraryError if it cannot be used.

    It is opened once: what is checked, tried in a child process and loaded is the same file, even if its name now
    belongs to another one.
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
    # It stays open: if a later library had the same path, the loader would take it for this one.
    return _link(program, _path_of(descriptor, library))


def _check_first_call(program: ReverseStep, library: Path, descriptor: int, digest: bytes) -> None:
    """Calls a library in a child process, unless a file next to it records a success; LibraryError if it fails."""
    key, checked = _key_of(digest), library.with_suffix(".checked")
    if key in _checked or _read_private(checked) == key:
        return
    log.info("Calling the compiled step for the first time, in a child process")
    arguments = program, torch.get_num_threads(), descriptor, library, FIRST_CALL_SECONDS
    seconds = START_SECONDS + FIRST_CALL_SECONDS
    try:
        call_in_child(first_call, *arguments, seconds=seconds, descriptors=(descriptor,))
    except ChildError as error:
        raise LibraryError(f"its first call failed: {error}") from error
    _checked.add(key)
    with suppress(OSError):  # a folder that cannot be written: the next process calls it again
        write_atomically(checked, key.encode())


def first_call(program: ReverseStep, threads: int, descriptor: int, library: Path, seconds: int) -> None:
    """Compares the compiled step with the other one; LibraryError. Ends this process if it takes too long."""
    torch.set_num_threads(threads)
    signal.alarm(seconds)  # no Python handler: native code in a loop never returns to Python to run one
    inputs = _small_step(program)
    with torch.inference_mode():
        expected = program(*inputs)
        found = _link(program, _path_of(descriptor, library))(*inputs)
    for one, other in zip(found, expected, strict=True):
        if one.shape != other.shape or not (one.float() - other.float()).abs().mean() <= TOLERANCE:
            raise LibraryError("its results are wrong")


def _small_step(program: ReverseStep) -> tuple[State, Tensor, Rows]:
    """Inputs of a step of three rows, two of them guided."""
    state, rows = State.zeros(3, program.checkpoint.image_shape, program.device), torch.arange(3)
    state.x_t = torch.randn(state.x_t.shape, generator=torch.Generator().manual_seed(0))
    t = program.checkpoint.schedule.num_steps // 4  # where a predicted x_0 does not magnify rounding
    plans = torch.tensor([[t, 0.9, 0.1, 0.0, 0.1]])
    return state, plans, Rows(rows, torch.zeros_like(rows), torch.cat([rows, rows[:2]]), torch.tensor([3, 4, 2]))


def _key_of(digest: bytes) -> str:
    """What a successful first call depends on: the library, torch, Python, the C library and the processor."""
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    size = torch_library.stat().st_size if torch_library.exists() else None
    versions = torch.__version__, torch.version.git_version, size, sys.version, platform.libc_ver()
    return hashlib.sha256(repr((digest, versions, _processor_features())).encode()).hexdigest()


def _read_private(path: Path) -> str | None:
    """The text of a file; None if it does not exist, or if others could have written it."""
    try:
        descriptor = open_private(path)
    except OSError:
        return None
    with os.fdopen(descriptor, errors="replace") as file:
        return file.read(1024)


def _path_of(descriptor: int, library: Path) -> str:
    """A path that the loader opens as the open file; its own one where there is no /proc."""
    path = f"/proc/self/fd/{descriptor}"
    return path if Path(path).exists() else str(library)


def _link(program: ReverseStep, path: str) -> Step:
    """The step of a library, which is loaded into this process."""
    native, flat = ctypes.CDLL(path), FlatStep(program)
    constants = flat.state_dict()
    if program.call_rows.most:
        compiled = NativeProgram(native, constants, num_outputs=1)
        program.denoise = lambda x_t, c: compiled(x_t, c)[0]
        return program
    if can_pack(program.device, program.dtype):
        return _PackedStep(flat, native)
    whole = NativeProgram(native, constants, num_outputs=3)
    return lambda state, plans, rows: cast(Stepped, whole(*state, plans, *rows))


class FlatStep(nn.Module):
    """The step with all tensors as positional arguments, as a compiled program takes them."""

    def __init__(self, program: ReverseStep) -> None:
        super().__init__()
        self.program = program

    def forward(self, *tensors: Tensor) -> Stepped:
        """Makes a step. `tensors` are the tensors of a State, the plans, and the tensors of Rows, in this order."""
        num_rows = len(Rows._fields)
        *state, plans = tensors[:-num_rows]
        return cast(Stepped, self.program(State(*state), plans, Rows(*tensors[-num_rows:])))


class _PackedStep:
    """The compiled step with weights packed for the evaluations of each call, and for the threads that make it."""

    def __init__(self, flat: FlatStep, library: ctypes.CDLL) -> None:
        self._library, self._constants = library, flat.state_dict()
        self._packer = Packer(flat, flat.program.see_network)
        self._programs: dict[tuple[int, int], NativeProgram] = {}
        self._program_for(torch.get_num_threads())  # where it cannot be had, that is known now

    def __call__(self, state: State, plans: Tensor, rows: Rows) -> Stepped:
        """Makes a step, as a ReverseStep does."""
        return cast(Stepped, self._program_for(len(rows.source))(*state, plans, *rows))

    def _program_for(self, evaluations: int) -> NativeProgram:
        """From as many evaluations as threads on, oneDNN's choice is the same."""
        threads = torch.get_num_threads()
        rows = min(evaluations, threads)
        if (threads, rows) not in self._programs:
            constants = self._constants | self._packer.weights_for(rows)
            self._programs[threads, rows] = NativeProgram(self._library, constants, num_outputs=3)
        return self._programs[threads, rows]


def _export_step(program: ReverseStep) -> torch.export.ExportedProgram:
    """The whole step, for any number of rows."""
    B, N = 8, 11  # neither 0 nor 1, nor equal: what is equal is taken for the same
    state = State.zeros(2 * B, program.checkpoint.image_shape, program.device)
    plans = torch.zeros(4, 5, device=program.device)
    slots, step, source, second = (torch.arange(n, device=program.device) % B for n in (B, B, N, B))
    rows, evaluations = Dim("B", min=1), Dim("N", min=1)
    shapes = (*({0: Dim.DYNAMIC} for _ in state), {0: Dim.DYNAMIC}, {0: rows}, {0: rows}, {0: evaluations}, {0: rows})
    inputs = (*state, plans, slots, step, source, second)
    exported = torch.export.export(FlatStep(program), inputs, dynamic_shapes=(shapes,))
    return take_packed_weights(exported) if can_pack(program.device, program.dtype) else exported


class _Denoise(nn.Module):
    """The network alone, where every call has the same number of rows."""

    def __init__(self, program: ReverseStep) -> None:
        super().__init__()
        self.program = program

    def forward(self, x_t: Tensor, c: Tensor) -> Tensor:
        return self.program.denoise(x_t, c)


def _export_denoise(program: ReverseStep) -> torch.export.ExportedProgram:
    rows = program.call_rows.most
    assert rows, "only where it is fixed"
    x_t = torch.zeros(rows, *program.checkpoint.image_shape, dtype=program.dtype, device=program.device)
    c = torch.zeros(rows, program.condition.shape[-1], dtype=program.dtype, device=program.device)
    return torch.export.export(_Denoise(program), (x_t, c))


def _processor_features() -> str:
    """What the processor can do: the code is made for exactly that."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _digest_of_sources() -> str:
    """Hashes all sources of the package, since nearly all of them can change the code or how it is called."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses the warnings that torch raises about itself while it compiles."""
    with warnings.catch_warnings(action="ignore"):
        yield
