"""Tests the requirements for compiling GPU kernels, without a GPU. test_private_cache.py tests the folder itself."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from model.compiled.compiler import CompilerError
from model.compiled.kernel_cache import prepare_kernel_cache


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Provides a C compiler and Python's headers, and a compile cache that does not change this process."""

    def use(cache: Path) -> Path:
        (cache / "torch").mkdir(parents=True, exist_ok=True)
        return cache / "torch"

    monkeypatch.setattr("model.compiled.kernel_cache.use_private_compile_cache", use)
    include = tmp_path_factory.mktemp("include")
    (include / "Python.h").touch()
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(include)})
    monkeypatch.setenv("CC", sys.executable)  # a program that exists on every machine


def test_kernels_are_cached_in_the_gpu_folder(tmp_path: Path) -> None:
    """In a container, the folder `gpu` is a mount that allows execution."""
    assert prepare_kernel_cache(tmp_path) == tmp_path / "gpu" / "torch"


@pytest.mark.parametrize(("flag", "name"), [(os.ST_NOEXEC, "noexec"), (os.ST_RDONLY, "read-only")])
def test_read_only_or_noexec_mount_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: int, name: str
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=flag))
    with pytest.raises(CompilerError, match=rf"mounted {name}\. Set UNFOG_CACHE_DIR"):
        prepare_kernel_cache(tmp_path)


def test_missing_c_compiler_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(CompilerError, match=r"needs a C compiler\. Install gcc, or set CC to another compiler"):
        prepare_kernel_cache(tmp_path)
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompilerError, match="needs a C compiler"):
        prepare_kernel_cache(tmp_path)
    (tmp_path / "gcc").touch(mode=0o700)
    prepare_kernel_cache(tmp_path)


def test_missing_python_headers_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(CompilerError, match="python3-dev"):
        prepare_kernel_cache(tmp_path)
