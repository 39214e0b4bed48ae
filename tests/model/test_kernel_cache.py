"""The folder for a GPU's kernels. It needs no GPU: Inductor and Triton read it from variables."""

import os
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch._inductor.runtime.cache_dir_utils import cache_dir, triton_cache_dir

from model.compiler import CompilerError
from model.kernel_cache import prepare_kernel_cache

VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A C compiler and Python's headers, and neither of the variables, which the function sets."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    include = tmp_path_factory.mktemp("include")
    (include / "Python.h").touch()
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(include)})
    monkeypatch.setenv("CC", sys.executable)  # a program that exists on every machine


def test_kernels_are_kept_in_a_private_folder_of_the_cache(tmp_path: Path) -> None:
    folder = prepare_kernel_cache(tmp_path / "cache")
    assert folder.is_relative_to(tmp_path / "cache")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert Path(cache_dir()) == folder  # torch's own answer
    assert Path(triton_cache_dir(0)).is_relative_to(folder)
    assert prepare_kernel_cache(tmp_path / "cache") == folder


def test_folders_that_the_operator_named_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, str(tmp_path / name))
    prepare_kernel_cache(tmp_path / "cache")
    assert [os.environ[name] for name in VARIABLES] == [str(tmp_path / name) for name in VARIABLES]


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o707])
def test_folder_that_others_can_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    prepare_kernel_cache(tmp_path).chmod(mode)
    with pytest.raises(CompilerError, match="other users can write to it"):
        prepare_kernel_cache(tmp_path)


def test_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(CompilerError, match="belongs to another user"):
        prepare_kernel_cache(tmp_path)


@pytest.mark.parametrize(("flag", "name"), [(os.ST_NOEXEC, "noexec"), (os.ST_RDONLY, "read-only")])
def test_mount_that_cannot_hold_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: int, name: str
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=flag))
    with pytest.raises(CompilerError, match=rf"mounted {name}\. Set UNFOG_CACHE_DIR"):
        prepare_kernel_cache(tmp_path)


def test_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CompilerError, match="Not a directory"):
        prepare_kernel_cache(tmp_path / "file")


def test_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(CompilerError, match=r"needs a C compiler\. Install gcc, or name a compiler in CC"):
        prepare_kernel_cache(tmp_path)
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompilerError, match="needs a C compiler"):
        prepare_kernel_cache(tmp_path)
    (tmp_path / "gcc").touch(mode=0o700)
    prepare_kernel_cache(tmp_path)


def test_missing_headers_of_python_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(CompilerError, match="python3-dev"):
        prepare_kernel_cache(tmp_path)
