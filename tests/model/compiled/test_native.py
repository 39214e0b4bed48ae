"""What is no compiled program is refused; that one is called aright is test_compiler.py's."""

import ctypes.util

import pytest

from model.compiled.native import NativeProgram


def test_a_library_without_a_program_is_refused() -> None:
    library = ctypes.util.find_library("c")
    if library is None:
        pytest.skip("no C library is found by name")
    with pytest.raises(AttributeError, match="AOTInductorModelContainer"):
        NativeProgram(ctypes.CDLL(library), {}, num_outputs=1)
