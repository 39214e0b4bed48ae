"""The reverse step compiled ahead of time: once for an architecture and a processor, then loaded in no time.

Weights are no part of it: checkpoints of one architecture share a library. It is found by everything that its bits
depend on but the C++ compiler, which need not be there any more. It is machine code: only the service's own user may
be able to write its folder.
"""

import ctypes
import hashlib
import logging
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast
from zipfile import ZipFile

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.export import Dim

from model.checkpoint import write_atomically
from model.native import NativeProgram
from model.packing import Packer, can_pack, take_packed_weights
from model.precision import can_compile, no_compiler
from model.step import ReverseStep, State, Step, Stepped

log = logging.getLogger(__name__)

OPTIONS = {
    "cpp.dynamic_threads": True,  # as many as serve, not as many as compiled
    "compile_threads": 1,  # no pool of processes for one program
    "always_keep_tensor_constants": True,  # no weight is written into the code, however short
    "aot_inductor.package_constants_in_so": False,  # nor beside it: each program would hold a copy
}

RECOMPILE_LIMIT = 64
DIGEST_BYTES = hashlib.sha256().digest_size  # at a library's end, where its loader does not look


class CompilerError(Exception):
    """The step cannot be compiled; one sentence."""


def default_cache() -> Path:
    """Where a user's programs keep what they can make again; a user without a home has / for one, as in a shell."""
    try:
        home = Path.home()
    except RuntimeError:
        home = Path("/")
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "unfog"


def compiled_step(program: ReverseStep, cache: Path) -> Step:
    """The step from the cache, compiled first where it is missing or damaged; CompilerError.

    On a GPU it is compiled while it is first called, and nothing is kept.
    """
    if program.device.type != "cpu":
        return _compiled_with_graphs(program)
    library = library_of(program, cache)
    try:
        return load(program, library)
    except FileNotFoundError:
        pass
    except (OSError, AttributeError, KeyError, RuntimeError) as error:
        log.warning("%s is made anew: %s", library, error)
    if not can_compile():
        raise CompilerError(f"compiling {no_compiler()}")
    try:
        return _keep(program, build(program), library)
    except Exception as error:  # whatever a full disk, a compiler of its own kind or torch itself does
        raise CompilerError(f"compiling failed: {error}".splitlines()[0]) from error


def _compiled_with_graphs(program: ReverseStep) -> Step:
    """Compiled once for all shapes but 1; for each of them a graph of its launches is recorded at its first call."""
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, RECOMPILE_LIMIT)  # of all networks together
    limits.fail_on_recompile_limit_hit = True  # else it would go on uncompiled
    compiled = torch.compile(program, mode="reduce-overhead", dynamic=True)

    def step(*inputs: Tensor) -> Stepped:
        torch.compiler.cudagraph_mark_step_begin()
        try:
            x_prev, x_0, finite = compiled(*inputs)
        except TorchDynamoException as error:
            raise CompilerError(f"compiling failed: {error}".splitlines()[0]) from error
        return x_prev.clone(), x_0.clone(), finite.clone()  # the next call writes where these lie

    return step


def library_of(program: ReverseStep, cache: Path) -> Path:
    """Where the compiled step lies, or would."""
    facts = (
        program.checkpoint.config.unet,
        {name: (tensor.shape, tensor.dtype, tensor.device) for name, tensor in program.state_dict().items()},
        torch.__version__,
        platform.machine(),
        _processor_features(),
        _digest_of_sources(),
        OPTIONS,
    )
    return cache.resolve() / f"step-{hashlib.sha256(repr(facts).encode()).hexdigest()[:20]}.so"


def build(program: ReverseStep) -> bytes:
    """A library of it; takes half a minute and a C++ compiler."""
    start = time.monotonic()
    log.info("compiling for this machine, once")
    with tempfile.TemporaryDirectory() as folder, _quiet(), torch.no_grad():
        exported = _export_denoise(program) if program.call_rows.most else _export_step(program)
        package = torch._inductor.aoti_compile_and_package(
            exported,
            package_path=f"{folder}/step.pt2",
            inductor_configs=dict(OPTIONS),  # torch writes into it
        )
        with ZipFile(package) as content:
            (name,) = (name for name in content.namelist() if name.endswith(".so"))
            code = content.read(name)
    log.info("compiled in %.0f s", time.monotonic() - start)
    return code + hashlib.sha256(code).digest()  # in one file: whoever comes second takes either


def _keep(program: ReverseStep, content: bytes, library: Path) -> Step:
    """The step from the cache; where that takes or runs no library, from a folder that is gone when it is loaded."""
    try:
        write_atomically(library, content)
        return load(program, library)
    except OSError as error:
        log.warning("%s cannot be used, so that each start compiles: %s", library, error)
    with tempfile.TemporaryDirectory() as folder:
        write_atomically(Path(folder) / library.name, content)
        return load(program, Path(folder) / library.name)


def load(program: ReverseStep, library: Path) -> Step:
    """The step that the library holds; OSError or RuntimeError where it is damaged."""
    content = library.read_bytes()
    if hashlib.sha256(content[:-DIGEST_BYTES]).digest() != content[-DIGEST_BYTES:]:
        raise RuntimeError("it is damaged")
    native, constants = ctypes.CDLL(str(library)), program.state_dict()
    if program.call_rows.most:
        compiled = NativeProgram(native, {f"program.{name}": constants[name] for name in constants}, num_outputs=1)
        program.denoise = lambda x_t, c: compiled(x_t, c)[0]
        return program
    if can_pack(program.device, program.dtype):
        return _PackedStep(program, native)
    return cast(Step, NativeProgram(native, constants, num_outputs=3))


class _PackedStep:
    """The compiled step with weights packed for the evaluations of each call, and for the threads that make it."""

    def __init__(self, program: ReverseStep, library: ctypes.CDLL) -> None:
        self._library, self._constants = library, program.state_dict()
        self._packer = Packer(program, program.see_network)
        self._programs: dict[tuple[int, int], NativeProgram] = {}
        self._program_for(torch.get_num_threads())  # where it cannot be had, that is known now

    def __call__(self, *inputs: Tensor) -> Stepped:
        """As a ReverseStep takes them."""
        *_, source, _ = inputs  # (N,)
        return cast(Stepped, self._program_for(len(source))(*inputs))

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
    exported = torch.export.export(program, (*state, plans, slots, step, source, second), dynamic_shapes=shapes)
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
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that torch gives of itself while it compiles."""
    with warnings.catch_warnings(action="ignore"):
        yield
