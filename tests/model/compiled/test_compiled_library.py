"""Tests which files are loaded as a compiled step, and what happens if their native code fails."""

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from app.runner.device import RunnerError
from app.runner.runner import Runner
from model import checkpoint
from model.compiled import compiler
from model.compiled.compiler import CompilerError, LibraryError, library_of
from model.precision import can_compile
from model.step import ReverseStep, Step, Stepped
from tests.app.runner.rows import draw, equal, mixed_rows
from tests.model.compiled.libraries import (
    CRASHES,
    HANGS,
    OTHER_USER,
    compile_library,
    library_content,
    needs_root,
)
from tests.model.compiled.log_fields import logged_field

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not can_compile(), reason="needs a C++ compiler")


@pytest.fixture
def program(path: Path) -> ReverseStep:
    return ReverseStep(checkpoint.load(path), CPU, torch.bfloat16)


@pytest.fixture(scope="module")
def content(path: Path, cache: Path) -> bytes:
    """The content of a working library, compiled once for all tests."""
    program = ReverseStep(checkpoint.load(path), CPU, torch.bfloat16)
    compiler.compiled_step(program, cache)
    return library_of(program, cache).read_bytes()


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records the names of functions that are called in a child process. Forgets earlier checks of this process."""
    called: list[str] = []
    call = compiler.call_in_child

    def record_call(function: Callable[..., None], *arguments: object, **options: object) -> None:
        called.append(function.__name__)
        call(function, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(compiler, "call_in_child", record_call)
    monkeypatch.setattr(compiler, "_checked", set())
    return called


@pytest.fixture
def builds(content: bytes, monkeypatch: pytest.MonkeyPatch) -> list[ReverseStep]:
    """Replaces the compiler by a function that records each program and copies the working library."""
    built: list[ReverseStep] = []

    def build(program: ReverseStep) -> bytes:
        built.append(program)
        return content

    monkeypatch.setattr(compiler, "build", build)
    return built


def small_step(step: Step, program: ReverseStep) -> tuple[Tensor, ...]:
    with torch.inference_mode():
        return step(*compiler._small_step(program))


def test_library_in_a_folder_that_others_can_write_is_not_loaded(
    program: ReverseStep, content: bytes, builds: list[ReverseStep], tmp_path: Path
) -> None:
    library_of(program, tmp_path).write_bytes(content)
    tmp_path.chmod(0o777)
    compiler.compiled_step(program, tmp_path)
    assert builds == [program]
    subfolder = tmp_path / f"private-{os.geteuid()}"
    assert library_of(program, subfolder).exists()
    assert stat.S_IMODE(subfolder.stat().st_mode) == 0o700
    compiler.compiled_step(program, tmp_path)
    assert builds == [program]  # not compiled again, because the private subfolder has the library


@needs_root
def test_untrusted_library_cache_is_logged_and_replaced_by_a_temporary_folder(
    program: ReverseStep,
    content: bytes,
    builds: list[ReverseStep],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    planted = tmp_path / f"private-{os.geteuid()}"
    planted.mkdir()
    library_of(program, planted).write_bytes(content)
    os.chown(planted, OTHER_USER, OTHER_USER)
    tmp_path.chmod(0o777)
    step = compiler.compiled_step(program, tmp_path)
    assert builds == [program]
    assert small_step(step, program)[0].isfinite().all()
    assert f"owned by user {OTHER_USER}" in logged_field(caplog, "Cache folder not usable")
    assert "only this user" in logged_field(caplog, "Cache folder not usable", "remedy")


@pytest.mark.parametrize("fault", ["writable by others", pytest.param("owned by user", marks=needs_root), "link"])
def test_library_file_that_others_could_write_is_recompiled(
    program: ReverseStep,
    content: bytes,
    builds: list[ReverseStep],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    fault: str,
) -> None:
    library = library_of(program, tmp_path)
    library.write_bytes(content)
    if fault == "writable by others":
        library.chmod(0o666)
    elif fault == "owned by user":
        os.chown(library, OTHER_USER, OTHER_USER)
    else:
        library.rename(tmp_path / "elsewhere")
        library.symlink_to(tmp_path / "elsewhere")
    compiler.compiled_step(program, tmp_path)
    assert builds == [program]
    assert "Discarding compiled step, recompiling" in caplog.text
    assert stat.S_IMODE(library.lstat().st_mode) == 0o644


def test_library_replaced_after_its_check_is_not_loaded(
    program: ReverseStep, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = library_of(program, tmp_path)
    library.write_bytes(content)
    other = tmp_path / "other.so"
    other.write_bytes(library_content(CRASHES, tmp_path))
    monkeypatch.setattr(compiler, "_check_first_call", lambda program, library, *_: other.rename(library))
    assert small_step(compiler.load(program, library), program)[0].isfinite().all()


def test_crashing_library_leaves_the_service_alive_without_compilation(
    path: Path,
    program: ReverseStep,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = draw(Runner({"default": checkpoint.load(path)}, CPU, torch.bfloat16), mixed_rows())
    library_of(program, tmp_path).write_bytes(library_content(CRASHES, tmp_path))
    monkeypatch.setattr(compiler, "can_compile", lambda: False)
    runner = Runner({"default": checkpoint.load(path)}, CPU, torch.bfloat16)
    assert not runner.compile(tmp_path, must=False)
    assert "first call failed: child process ended by SIGSEGV" in logged_field(caplog, "Model not compiled")
    assert not runner.models["default"].compiled
    assert equal(draw(runner, mixed_rows()), plain)
    with pytest.raises(RunnerError, match=r"^UNFOG_COMPILE=on: .*SIGSEGV\. Compiling it again needs a C\+\+ compiler"):
        runner.compile(tmp_path, must=True)


def test_crashing_library_is_recompiled(
    program: ReverseStep, builds: list[ReverseStep], content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    library = library_of(program, tmp_path)
    library.write_bytes(library_content(CRASHES, tmp_path))
    step = compiler.compiled_step(program, tmp_path)
    assert "ended by SIGSEGV" in logged_field(caplog, "Discarding compiled step")
    assert builds == [program]
    assert library.read_bytes() == content
    assert small_step(step, program)[0].isfinite().all()


def test_new_library_that_crashes_is_not_cached(
    program: ReverseStep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").mkdir()
    crashing = library_content(CRASHES, tmp_path)
    monkeypatch.setattr(compiler, "build", lambda program: crashing)
    with pytest.raises(CompilerError, match=r"^compiling failed: its first call failed: .*ended by SIGSEGV$"):
        compiler.compiled_step(program, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_hanging_library_is_not_used(program: ReverseStep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library_of(program, tmp_path).write_bytes(library_content(HANGS, tmp_path))
    monkeypatch.setattr(compiler, "can_compile", lambda: False)
    monkeypatch.setattr(compiler, "FIRST_CALL_SECONDS", 1)
    with pytest.raises(CompilerError, match="its first call failed: child process gave no result in time"):
        compiler.compiled_step(program, tmp_path)


@pytest.mark.parametrize("error", ["shape", "value", "nan", "errors at known pixels", "none"])
def test_first_call_compares_with_the_step_without_compilation(
    program: ReverseStep, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    changes: dict[str, Callable[[Stepped], Stepped]] = {
        "shape": lambda stepped: stepped._replace(x_0=stepped.x_0[:, :, 1:]),
        "value": lambda stepped: stepped._replace(x_0=stepped.x_0 + 0.2),
        "nan": lambda stepped: stepped._replace(x_0=stepped.x_0 * torch.nan),
        "errors at known pixels": lambda stepped: stepped._replace(error=stepped.error * 0.5),
        "none": lambda stepped: stepped._replace(x_0=stepped.x_0 + 0.01),
    }

    def step(*inputs: Any) -> Stepped:
        return changes[error](program(*inputs))

    monkeypatch.setattr(compiler, "_open_library", lambda program, path: step)
    monkeypatch.setattr("signal.alarm", lambda seconds: None)
    arguments = program, torch.get_num_threads(), 0, Path("library"), 1
    if error == "none":
        compiler.first_call(*arguments)
        return
    with pytest.raises(LibraryError, match="its results differ"):
        compiler.first_call(*arguments)


def test_library_is_checked_in_a_child_process_only_once(
    program: ReverseStep,
    content: bytes,
    children: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = library_of(program, tmp_path)
    library.write_bytes(content)
    compiler.load(program, library)
    assert children == ["first_call"]
    monkeypatch.setattr(compiler, "_checked", set())  # a new process has not checked any library
    compiler.load(program, library)
    assert children == ["first_call"]
    monkeypatch.setattr(torch.version, "git_version", "another build")
    compiler.load(program, library)
    assert children == ["first_call"] * 2


def test_check_file_that_others_could_write_is_ignored(
    program: ReverseStep, content: bytes, children: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = library_of(program, tmp_path)
    library.write_bytes(content)
    compiler.load(program, library)
    library.with_suffix(".checked").chmod(0o666)
    monkeypatch.setattr(compiler, "_checked", set())
    compiler.load(program, library)
    assert children == ["first_call"] * 2


PLANT_LIBRARIES = """
import shutil, sys
from torch._inductor.cpp_builder import CppBuilder
from torch._inductor.cpu_vec_isa import VecISA, supported_vec_isa_list
CppBuilder.build = lambda self: shutil.copy(sys.argv[1], self.get_target_file_path())
VecISA._probe_load = lambda self, path: True
assert any([bool(isa) for isa in supported_vec_isa_list])  # a processor without AMX does not test the AMX library
"""
COMPILE = """
import sys, torch
from pathlib import Path
from typing import Any
from model import checkpoint
from model.compiled import compiler
from model.step import ReverseStep
program = ReverseStep(checkpoint.load(Path(sys.argv[1])), torch.device("cpu"), torch.bfloat16)
try:
    compiler.compiled_step(program, Path(sys.argv[2]))
except compiler.CompilerError as error:
    print(error)
"""
WRITES_MARKER = """
#include <cstdlib>
#include <fstream>
__attribute__((constructor)) static void run() {
    if (auto* marker = std::getenv("MARKER")) std::ofstream(marker) << "ran";
}
"""


def test_library_planted_in_the_predictable_folder_is_not_executed(path: Path, tmp_path: Path) -> None:
    """Inductor tests the processor with libraries from its cache, so a planted library would be loaded.

    The fake g++ answers questions about its version and fails otherwise, so that the test is fast.
    """
    planted, marker = compile_library(WRITES_MARKER, tmp_path / "planted.so"), tmp_path / "marker"
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    cxx = tmp_path / "g++"
    cxx.write_text('#!/bin/sh\ncase "$*" in *-v|*--version|*-dumpversion|*-dumpmachine) exec g++ "$@";; esac\nexit 1\n')
    cxx.chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    environment = clean | {"TMPDIR": str(temporary), "CXX": str(cxx)}

    def run(code: str, *arguments: Path, **variables: str) -> str:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        done = subprocess.run(command, env=environment | variables, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(PLANT_LIBRARIES, planted)
    (predictable,) = temporary.glob("torchinductor_*")
    assert list(predictable.rglob("*.so"))
    assert "compiling failed" in run(COMPILE, path, tmp_path / "cache", MARKER=str(marker))
    assert not marker.exists()
    assert list(temporary.iterdir()) == [predictable]  # the private folder is deleted
