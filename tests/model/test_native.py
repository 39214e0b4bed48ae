"""What is no compiled program is refused; that one is called aright is test_compiler.py's."""

import ctypes.util
from pathlib import Path

import pytest

from model.native import NativeProgram


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "step.so").write_bytes(b"no code")
    with pytest.raises(OSError, match=r"step\.so"):
        NativeProgram(tmp_path / "step.so", {}, num_outputs=1)


def test_a_library_without_a_program_is_refused() -> None:
    library = ctypes.util.find_library("c")
    if library is None:
        pytest.skip("no C library is found by name")
    with pytest.raises(AttributeError, match="AOTInductorModelContainer"):
        NativeProgram(Path(library), {}, num_outputs=1)
